// Products with a weight matrix: preparing activations, and the choice of the kernel.
#include "linear_rows.h"

namespace qnext::QNEXT_ISA {
namespace {

constexpr uint32_t kInfinity = 0x7f800000u;

uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// ---- f32 and bf16 ----

// Infinity becomes NaN, because infinity times a weight could cancel or vanish from sight.
void copy_f32(const float* x, int64_t n, int64_t wide, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(x[i]);
    to[i] = float_of((bits & kInfinity) == kInfinity ? 0x7fc00000u : bits);
  }
  for (int64_t i = n; i < wide; ++i) to[i] = 0.0f;
}

#if defined(QNEXT_ISA_avx512)
Bf16Input bf16_input(bf16 x) { return x; }
#else
Bf16Input bf16_input(bf16 x) { return from_bf16(x); }
#endif

void copy_bf16(const float* x, int64_t n, int64_t wide, Bf16Input* to) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits = bits_of(x[i]);
    // Round first: the largest floats become infinite.
    bits = (bits & kInfinity) == kInfinity ? bits : bits + 0x7fffu + ((bits >> 16) & 1u);
    bits = (bits & kInfinity) == kInfinity ? 0x7fc00000u : bits;
    to[i] = bf16_input(static_cast<bf16>(bits >> 16));
  }
  for (int64_t i = n; i < wide; ++i) to[i] = bf16_input(0);
}

// ---- q8 and q4 ----

struct QuantBlock {
  float scale;
  alignas(64) int8_t q[kBlock];
};

// One block of up to 256 columns as int8. A scale of NaN marks a block with a non-finite value;
// blocks below 1.5e-36 count as zero, so that neither the scale nor its inverse leaves the range of
// normal floats.
void quantise(const float* x, int64_t n, QuantBlock* block) {
  uint32_t top = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
    top = magnitude > top ? magnitude : top;
  }
  for (int64_t i = 0; i < kBlock; i += 32) memset(block->q + i, 0, 32);
  const float largest = float_of(top);
  if (top >= kInfinity) {
    block->scale = float_of(0x7fc00000u);
    return;
  }
  if (largest < 1.5e-36f) {
    block->scale = 0.0f;
    return;
  }
  block->scale = largest / 127.0f;
  const float inverse = 127.0f / largest;
#if defined(QNEXT_ISA_avx512)
  for (int64_t i = 0; i < n; i += 16) {
    // Rounds to the nearest integer, ties to even, as the sum below does.
    const int live = n - i < 16 ? static_cast<int>(n - i) : 16;
    const Vec scaled = Vec::load(x + i, live) * Vec::set(inverse);
    _mm_mask_storeu_epi8(block->q + i, static_cast<__mmask16>((1u << live) - 1u),
                         _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(scaled.v)));
  }
  return;
#endif
  for (int64_t i = 0; i < n; ++i) {
    // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, into the lowest bits.
    block->q[i] = static_cast<int8_t>(bits_of(x[i] * inverse + 12582912.0f));
  }
}

int32_t sum16(const int8_t* q) {
#if defined(QNEXT_ISA_avx512)
  const __m128i wide = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
  return _mm512_reduce_add_epi32(_mm512_cvtepi8_epi32(wide));
#else
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += q[i];
  return sum;
#endif
}

int32_t write_group_q4(const int8_t* q, char* to) {
  const int32_t sum = sum16(q);
  int32_t start = -8 * sum;
#if defined(QNEXT_ISA_avx2)
  start &= 0xffff;  // sums run in pairs of 16 bits there
#endif
  memcpy(to, q, 16);
  memcpy(to + 16, &start, 4);
  return sum;
}

int32_t write_group_q8(const int8_t* q, char* to) {
#if defined(QNEXT_ISA_avx2)
  int16_t wide[16];
  for (int i = 0; i < 16; i += 4) {
    wide[i] = q[i];
    wide[i + 1] = q[i + 2];
    wide[i + 2] = q[i + 1];
    wide[i + 3] = q[i + 3];
  }
  memcpy(to, wide, 32);
#else
  memcpy(to, q, 16);
#endif
  return sum16(q);
}

void prepare_quant_block(Format format, const float* x, int64_t cols, int64_t block, char* row) {
  const int64_t group_bytes = format == Format::q4 ? kGroupQ4 : kGroupQ8;
  const QuantRow at(cols, group_bytes);
  const int64_t begin = block * kBlock;
  const int64_t n = cols - begin < kBlock ? cols - begin : kBlock;
  QuantBlock values;
  quantise(x + begin, n, &values);
  const int64_t first = block * 16;
  const int64_t groups = at.groups - first < 16 ? at.groups - first : 16;
  int32_t sum = 0;
  for (int64_t g = 0; g < groups; ++g) {
    char* to = row + (first + g) * group_bytes;
    sum += format == Format::q4 ? write_group_q4(values.q + g * 16, to)
                                : write_group_q8(values.q + g * 16, to);
  }
  const int32_t start = -128 * sum;
  memcpy(row + at.scales + block * 4, &values.scale, 4);
  memcpy(row + at.starts + block * 4, &start, 4);
}

// ---- the table ----

int64_t row_stride(Format format, int64_t cols) {
  switch (format) {
    case Format::f32: return odd_lines(padded(cols) * 4);
    case Format::bf16: return odd_lines(padded(cols) * static_cast<int64_t>(sizeof(Bf16Input)));
    case Format::q8: return QuantRow(cols, kGroupQ8).stride;
    default: return QuantRow(cols, kGroupQ4).stride;
  }
}

int64_t prepared_bytes(Format format, int64_t count, int64_t cols) {
  return count * row_stride(format, cols);
}

// The work is split by blocks of 256 columns, so that a single row is shared too.
void prepare(Format format, const float* x, int64_t ldx, int64_t count, int64_t cols,
             void* prepared, const Team& team) {
  const int64_t stride = row_stride(format, cols);
  const int64_t blocks = (cols + kBlock - 1) / kBlock;
  int64_t first, last;
  team.range(count * blocks, 1, &first, &last);
  for (int64_t i = first; i < last; ++i) {
    const int64_t p = i / blocks, block = i % blocks, begin = block * kBlock;
    const float* from = x + p * ldx;
    char* row = static_cast<char*>(prepared) + p * stride;
    const int64_t n = cols - begin < kBlock ? cols - begin : kBlock;
    if (format == Format::f32) {
      copy_f32(from + begin, n, padded(n), reinterpret_cast<float*>(row) + begin);
    } else if (format == Format::bf16) {
      copy_bf16(from + begin, n, padded(n), reinterpret_cast<Bf16Input*>(row) + begin);
    } else {
      prepare_quant_block(format, from, cols, block, row);
    }
  }
}

int64_t scratch_bytes(const Matrix& w, int64_t count) {
  return w.format == Format::q8 || w.format == Format::q4 ? quant_scratch_bytes(w, count) : 0;
}

void multiply(const Matrix& w, const void* prepared, int64_t, const int32_t* index, int64_t count,
              float* out, int64_t ldo, int64_t first, int64_t last, void* scratch,
              const void* next) {
  if (count <= 0 || first >= last) return;
  if (w.format == Format::q8 || w.format == Format::q4) {
    multiply_quant(w, prepared, index, count, out, ldo, first, last, scratch, next);
  } else {
    if (next) ask_for_first(next);
    multiply_dense(w, prepared, index, count, out, ldo, first, last);
  }
}

}  // namespace

const LinearKernels linear_kernels = {prepared_bytes, prepare, scratch_bytes, multiply};

}  // namespace qnext::QNEXT_ISA
