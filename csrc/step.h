// A step as Python describes it.
#pragma once

#include "bindings.h"
#include "decoder.h"

namespace qnext {

// row, tokens, before, first, slot, kept, speculative, pending, offset of its pages
constexpr int kSequenceColumns = 9;

inline Step step_of(Array<const int32_t> ids, Array<const int64_t> sequences, Array<const int64_t> pages) {
  Step step;
  step.ids = ids.data();
  step.rows = static_cast<int64_t>(ids.size());
  const auto B = static_cast<int64_t>(sequences.size()) / kSequenceColumns;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t* s = sequences.data() + b * kSequenceColumns;
    step.sequences.push_back({s[0], s[1], s[2], s[3], s[4], s[5], s[7], s[6] != 0,
                              pages.data() + s[8]});
  }
  return step;
}

}  // namespace qnext
