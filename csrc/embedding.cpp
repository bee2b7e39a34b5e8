#include "embedding.h"

#include <cstring>

namespace qnext {
namespace {

float value_of_bf16(uint16_t x) {
  const uint32_t wide = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}

}  // namespace

void read_row(const Matrix& w, int64_t row, int64_t first, int64_t last, float* out) {
  const auto* bytes = static_cast<const uint8_t*>(w.data);
  if (w.format == Format::f32) {
    std::memcpy(out + first, bytes + (row * w.cols + first) * 4,
                static_cast<size_t>(last - first) * 4);
    return;
  }
  if (w.format == Format::bf16) {
    const auto* in = reinterpret_cast<const uint16_t*>(bytes) + row * w.cols;
    for (int64_t c = first; c < last; ++c) out[c] = value_of_bf16(in[c]);
    return;
  }
  const uint8_t* tile = bytes + matrix_bytes(w.format, row / kTileRows * kTileRows, w.cols);
  const int64_t r = row % kTileRows, line = r / 16 * 64 + r % 16 * 4;
  if (w.format == Format::q8) {
    constexpr int64_t kLinesAhead = 16;  // each 4 columns further on
    for (int64_t c = first; c < last; ++c) {
      const uint8_t* block = tile + c / kBlock * (128 + kBlock * kTileRows);
      const int64_t k = c % kBlock;
      const uint8_t* at = block + 128 + k / 4 * 128 + line;
      if (k % 4 == 0) __builtin_prefetch(at + kLinesAhead * 128, 0, 3);
      float d;
      std::memcpy(&d, block + r * 4, 4);
      out[c] = d * static_cast<float>(at[k % 4] - 128);
    }
    return;
  }
  float scale;
  std::memcpy(&scale, tile + r * 4, 4);
  for (int64_t c = first; c < last; ++c) {
    const uint8_t* piece = tile + 128 + c / 32 * 576;
    const int64_t k = c % 32;
    const uint8_t* pair = piece + 64 + k / 8 * 128 + line;
    if (k % 8 == 0) {
      // Its own lines of the pieces to come: each alone would wait for memory.
      __builtin_prefetch(pair + 4 * 576, 0, 3);
      if (k == 0) __builtin_prefetch(piece + 4 * 576, 0, 3);
    }
    const int s = static_cast<int8_t>(piece[k / 16 * 32 + r]);
    const int q = (k % 8 < 4 ? pair[k % 4] & 15 : pair[k % 4] >> 4) - 8;
    out[c] = scale * static_cast<float>(s * q);
  }
}

void embed(const Matrix& w, const int32_t* ids, int64_t count, float* out, int64_t ldo,
           const Team& team) {
  const int64_t blocks = (w.cols + kBlock - 1) / kBlock;
  int64_t first, last;
  team.range(count * blocks, 1, &first, &last);
  for (int64_t i = first; i < last; ++i) {
    const int64_t begin = i % blocks * kBlock;
    const int64_t end = begin + kBlock < w.cols ? begin + kBlock : w.cols;
    read_row(w, ids[i / blocks], begin, end, out + i / blocks * ldo);
  }
}

}  // namespace qnext
