// Scratch memory of one call: pieces are announced, obtained in one allocation, then placed.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

namespace qnext::QNEXT_ISA {

class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { free(start_); }

  // Announce `count` numbers; what comes back is their offset, `place` makes addresses of them.
  template <class T>
  T* take(int64_t count) {
    const size_t at = bytes_;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    return reinterpret_cast<T*>(at);
  }

  // False when there is not enough memory.
  bool obtain() {
    start_ = static_cast<char*>(aligned_alloc(64, bytes_ + 64));
    return start_ != nullptr;
  }

  template <class... T>
  void place(T**... pieces) const {
    ((*pieces = reinterpret_cast<T*>(start_ + reinterpret_cast<size_t>(*pieces))), ...);
  }

 private:
  char* start_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace qnext::QNEXT_ISA
