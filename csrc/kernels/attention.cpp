// Paged attention. Rows are (token, query head) pairs of one sequence that share a head of keys and
// values; up to kTileRows of them walk the positions together, in blocks of kBlockKeys, with an
// online softmax in base 2. Every kPiece positions the running state starts afresh, and the states
// of a row's pieces are merged in order: so pieces can be computed by different threads, and the
// bits are those of one thread doing all of them. Where few tokens walk a long context, a thread
// takes all heads of a block at once: then memory is read in the order of addresses.
#include "attention.h"

#include "attention_tiles.h"

namespace qnext::QNEXT_ISA {
namespace {

constexpr int64_t kTileRows = 96;
constexpr int64_t kBlockKeys = 128;
constexpr int64_t kPiece = 512;
// A tile is cut into pieces when it is more than this part of a thread's share of the work.
constexpr int64_t kTilesPerThread = 32;
constexpr int64_t kRowsAhead = 2;
// With so many pieces for each thread, a piece covers all heads.
constexpr int64_t kPiecesPerThread = 4;
constexpr float kLog2e = 1.44269504088896341f;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// What follows from a job alone.
struct Layout {
  explicit Layout(const AttentionJob& job)
      : group(job.heads / job.kv_heads),
        width(round_up(job.head_size, kPanel)),
        q_stride(job.heads * job.head_size * (job.gated ? 2 : 1)),
        item(job.type == CacheType::bf16 ? 2 : 4),
        position(job.kv_heads * job.head_size * item),
        half(job.page_size * position),
        page(job.layers * 2 * half),
        base(static_cast<char*>(job.cache) + job.layer * 2 * half) {}

  int64_t group;     // query heads of a head of keys
  int64_t width;     // columns of the accumulators, whole panels
  int64_t q_stride;  // floats from row to row of q
  int64_t item;      // bytes of one cached number
  int64_t position;  // bytes from one position to the next, all heads
  int64_t half;      // bytes from the keys of a page to its values
  int64_t page;      // bytes from page to page
  char* base;        // keys of page 0 of this layer

  char* keys(const AttentionJob& job, const AttentionSequence& s, int64_t at) const {
    return base + s.pages[at / job.page_size] * page + at % job.page_size * position;
  }
};

// The running softmax of some rows: largest score (base 2), sum of weights, weighted values.
struct State {
  float* top;
  float* sum;
  float* values;  // [rows][width]

  State from(const Layout& layout, int64_t row) const {
    return {top + row, sum + row, values + row * layout.width};
  }
};

// Rows [row, row + rows) of the tokens * group rows of one sequence, for some heads of keys.
// What is kept for a tile is kept for all rows of the first head, then for those of the next.
struct Tile {
  const AttentionSequence* sequence;
  int64_t head;
  int64_t heads;  // heads * rows is at most kTileRows
  int64_t row;
  int64_t rows;

  // Positions row i of the tile sees end here.
  int64_t limit(const Layout& layout, int64_t i) const {
    return sequence->before + (row + i) / layout.group + 1;
  }
  int64_t limit(const Layout& layout) const { return limit(layout, rows - 1); }
  // The first row that sees a position.
  int64_t first_row(const Layout& layout, int64_t position) const {
    return larger(0, (position - sequence->before) * layout.group - row);
  }
  int64_t first_piece() const { return sequence->first / kPiece; }
  int64_t last_piece(int64_t limit) const { return (limit - 1) / kPiece; }
};

// The rows of one sequence for all heads of keys, and how they are shared out.
struct Share {
  int64_t rows;
  int64_t tiles;
  int64_t limit;
  int64_t pieces;  // from piece 0, visible or not
  const AttentionSequence* sequence;

  Share(const Layout& layout, const AttentionSequence& s)
      : rows(s.tokens * layout.group),
        tiles(ceil_div(rows, kTileRows)),
        limit(s.before + s.tokens),
        pieces(ceil_div(limit, kPiece)),
        sequence(&s) {}

  Tile tile(int64_t head, int64_t heads, int64_t row) const {
    return {sequence, head, heads, row, smaller(kTileRows, rows - row)};
  }
  // Products of rows with positions, one head of keys.
  int64_t cost(const Layout& layout) const {
    int64_t sum = 0;
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const Tile part = tile(0, 1, row);
      sum += part.rows * (part.limit(layout) - sequence->first);
    }
    return sum;
  }
  // Whether the tiles are cut into pieces, given the cost of all sequences.
  bool split(int64_t total, int threads) const {
    const int64_t most = smaller(rows, kTileRows) * (limit - sequence->first);
    return most * kTilesPerThread * threads > total;
  }
};

// Sequences that are cut into pieces have their states side by side in the scratch: for every head
// and piece the rows of the sequence.
struct Plan {
  int64_t total = 0;         // cost of all sequences
  int64_t split_rows = 0;    // rows of states of split sequences of several pieces
  int64_t whole_tiles = 0;   // tiles that are not split
  int64_t split_cost = 0;
  int64_t pieces = 0;        // of split sequences
  bool merged = false;       // whether a second phase merges pieces

  Plan(const AttentionJob& job, const Layout& layout, int threads) {
    for (int64_t b = 0; b < job.count; ++b) {
      total += job.kv_heads * Share(layout, job.sequences[b]).cost(layout);
    }
    for (int64_t b = 0; b < job.count; ++b) {
      const AttentionSequence& s = job.sequences[b];
      const Share share(layout, s);
      if (share.split(total, threads)) {
        pieces += share.pieces - s.first / kPiece;
        split_cost += job.kv_heads * share.cost(layout);
        if (share.pieces > 1) {
          split_rows += share.rows * share.pieces * job.kv_heads;
          merged = true;
        }
      } else {
        whole_tiles += share.tiles * job.kv_heads;
      }
    }
  }
};

// Cuts one piece of memory into aligned parts.
struct Cutter {
  uintptr_t at;
  template <class T>
  T* take(int64_t count) {
    const uintptr_t part = at;
    at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(part);
  }
};

// What one thread needs.
struct Workspace {
  uint32_t* q;             // [kTileRows][H] steps of the tile's queries
  float* scores;           // [kTileRows][kBlockKeys]; then probabilities
  float* panel;            // keys or values of a panel
  float* keep;             // [kTileRows]
  float* row;              // [H]
  State piece, total;
  const void** rows[2];    // [3][kBlockKeys] keys and values of a block, keys of the next one
  char* zeros;             // one position

  Workspace(Cutter* cut, const AttentionJob& job, const Layout& layout)
      : q(cut->take<uint32_t>(kTileRows * job.head_size)),
        scores(cut->take<float>(kTileRows * kBlockKeys)),
        panel(cut->take<float>(kPanel * larger(job.head_size, kBlockKeys))),
        keep(cut->take<float>(kTileRows)),
        row(cut->take<float>(job.head_size)),
        piece{cut->take<float>(kTileRows), cut->take<float>(kTileRows),
              cut->take<float>(kTileRows * layout.width)},
        total{cut->take<float>(kTileRows), cut->take<float>(kTileRows),
              cut->take<float>(kTileRows * layout.width)},
        rows{cut->take<const void*>(3 * kBlockKeys), cut->take<const void*>(3 * kBlockKeys)},
        zeros(cut->take<char>(layout.position)) {}
};

struct Scratch {
  Counter* counter;
  State split;  // rows of all split sequences
  uintptr_t own;  // workspaces

  Scratch(Cutter* cut, const Layout& layout, const Plan& plan)
      : counter(cut->take<Counter>(1)),
        split{cut->take<float>(plan.split_rows), cut->take<float>(plan.split_rows),
              cut->take<float>(plan.split_rows * layout.width)},
        own(cut->at) {}
};

int64_t workspace_bytes(const AttentionJob& job, const Layout& layout) {
  Cutter cut{0};
  Workspace(&cut, job, layout);
  return static_cast<int64_t>(cut.at);
}

int64_t scratch_bytes(const AttentionJob& job, int threads) {
  const Layout layout(job);
  const Plan plan(job, layout, threads);
  Cutter cut{0};
  Scratch(&cut, layout, plan);
  return static_cast<int64_t>(cut.at) + threads * workspace_bytes(job, layout);
}

// -- queries, keys and values of the new tokens --------------------------------------------------

void norm_head(const float* x, int64_t size, const float* weight, float eps, float* out) {
  Vec squares = Vec::zero();
  int64_t d = 0;
  for (; d + Vec::width <= size; d += Vec::width) {
    const Vec v = Vec::load(x + d);
    squares = fma(v, v, squares);
  }
  const int rest = static_cast<int>(size - d);
  if (rest) {
    const Vec v = Vec::load(x + d, rest);
    squares = fma(v, v, squares);
  }
  const Vec scale = Vec::set(1.0f / sqrtf(squares.sum() / static_cast<float>(size) + eps));
  for (d = 0; d + Vec::width <= size; d += Vec::width) {
    (Vec::load(x + d) * scale * Vec::load(weight + d)).store(out + d);
  }
  if (rest) (Vec::load(x + d, rest) * scale * Vec::load(weight + d, rest)).store(out + d, rest);
}

void rotate_head(float* x, int64_t rotary, const float* cos, const float* sin) {
  const int64_t half = rotary / 2;
  int64_t i = 0;
  for (; i + Vec::width <= half; i += Vec::width) {
    const Vec a = Vec::load(x + i), b = Vec::load(x + half + i);
    (a * Vec::load(cos + i) - b * Vec::load(sin + i)).store(x + i);
    (b * Vec::load(cos + half + i) + a * Vec::load(sin + half + i)).store(x + half + i);
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[half + i] + a * sin[half + i];
  }
}

void write_head(const float* x, int64_t size, CacheType type, char* to) {
  if (type == CacheType::f32) {
    memcpy(to, x, sizeof(float) * size);
    return;
  }
  bf16* out = reinterpret_cast<bf16*>(to);
  int64_t d = 0;
  for (; d + Vec::width <= size; d += Vec::width) Vec::load(x + d).store(out + d);
  for (; d < size; ++d) out[d] = to_bf16(x[d]);
}

void prefetch_row(const float* row, int64_t size) {
  for (int64_t d = 0; d < size; d += 16) __builtin_prefetch(row + d, 0, 3);
}

void append(const AttentionJob& job, void* scratch, const Team& team) {
  const Layout layout(job);
  const int64_t H = job.head_size;
  if (team.thread == 0) static_cast<Counter*>(scratch)->value = 0;
  int64_t tokens = 0, begin, end;
  for (int64_t b = 0; b < job.count; ++b) tokens += job.sequences[b].tokens;
  team.range(tokens, 1, &begin, &end);
  int64_t passed = 0;
  for (int64_t b = 0; b < job.count; passed += job.sequences[b++].tokens) {
    const AttentionSequence& s = job.sequences[b];
    const int64_t last = smaller(s.tokens, end - passed);
    for (int64_t t = larger(0, begin - passed); t < last; ++t) {
      const int64_t row = s.row + t;
      char* keys = layout.keys(job, s, s.before + t);
      for (int64_t g = 0; g < job.kv_heads; ++g) {
        float* k = job.k + (row * job.kv_heads + g) * H;
        if (job.k_norm) norm_head(k, H, job.k_norm, job.eps, k);
        rotate_head(k, job.rotary, job.cos + row * job.rotary, job.sin + row * job.rotary);
        char* to = keys + g * H * layout.item;
        write_head(k, H, job.type, to);
        write_head(job.v + (row * job.kv_heads + g) * H, H, job.type, to + layout.half);
      }
    }
  }
}

// -- attention -----------------------------------------------------------------------------------

// Where the keys (then, kBlockKeys further on, the values) of a block's positions lie; zeros for
// the positions from `end` on.
void find_rows(const AttentionJob& job, const Layout& layout, const Tile& tile, int64_t block,
               int64_t end, const void* zeros, const void** rows) {
  const int64_t head = tile.head * job.head_size * layout.item;
  int64_t j = 0;
  const int64_t count = smaller(kBlockKeys, end - block);
  // Positions before `first` may have no page.
  const int64_t hidden = smaller(larger(0, tile.sequence->first - block), count);
  for (; j < hidden; ++j) rows[j] = rows[kBlockKeys + j] = zeros;
  while (j < count) {
    const char* at = layout.keys(job, *tile.sequence, block + j) + head;
    const int64_t stop = smaller(count, j + job.page_size - (block + j) % job.page_size);
    for (; j < stop; ++j, at += layout.position) {
      rows[j] = at;
      rows[kBlockKeys + j] = at + layout.half;
    }
  }
  for (; j < kBlockKeys; ++j) rows[j] = rows[kBlockKeys + j] = zeros;
}

// One row's scores [kBlockKeys] become probabilities; the row sees [low, high) of the block.
// Returns what the state before is to be multiplied with.
template <class Kind>
float soften(float* scores, int64_t low, int64_t high, float scale, bool fresh, float* top,
             float* sum) {
  constexpr int W = Vec::width;
  // Unseen scores take the value of a seen one, so that they change nothing but their own weight.
  for (int64_t j = 0; j < low; ++j) scores[j] = scores[low];
  for (int64_t j = high; j < kBlockKeys; ++j) scores[j] = scores[low];
  const int64_t count = round_up(high, W);
  Vec largest = Vec::load(scores);
  for (int64_t j = W; j < count; j += W) largest = max(largest, Vec::load(scores + j));
  float now = largest.max() * scale;
  if (!fresh && *top > now) now = *top;
  const Vec scales = Vec::set(scale), tops = Vec::set(now);
  for (int64_t j = 0; j < count; j += W) {
    exp2_negative(Vec::load(scores + j) * scales - tops).store(scores + j);
  }
  for (int64_t j = 0; j < low; ++j) scores[j] = 0.0f;
  for (int64_t j = high; j < kBlockKeys; ++j) scores[j] = 0.0f;
  const float added = Kind::pack_probabilities(scores, kBlockKeys).sum();
  float keep = 0.0f;
  if (!fresh) {
    float kept[W];
    exp2_negative(Vec::set(*top - now)).store(kept);
    keep = kept[0];
  }
  *sum = fresh ? added : *sum * keep + added;
  *top = now;
  return keep;
}

// The state of a tile after the positions of one piece, from nothing; that of head i of the tile
// stands i * `stride` rows further on. `cold`: nobody has asked for the first keys yet. Positions up
// to `after` will be walked by this thread next.
template <class Kind>
void walk_piece(const AttentionJob& job, const Layout& layout, const Tile& tile, int64_t piece,
                bool cold, int64_t after, const Workspace& work, const State& states,
                int64_t stride) {
  const int64_t H = job.head_size, steps = H / Kind::kStep;
  const int64_t first = tile.sequence->first, limit = tile.limit(layout);
  const int64_t end = smaller(limit, (piece + 1) * kPiece);
  const int64_t start = larger(piece * kPiece, first / kBlockKeys * kBlockKeys);
  const float scale = job.scale * kLog2e;
  const int64_t bytes = tile.heads * H * layout.item;
  const void** rows = work.rows[0];
  const void** next = work.rows[1];
  find_rows(job, layout, tile, start, end, work.zeros, rows);
  if (cold) Ahead(rows, kBlockKeys, bytes).fetch_rest();
  for (int64_t block = start; block < end; block += kBlockKeys) {
    const int64_t seen = smaller(kBlockKeys, end - block);
    const bool fresh = block == start, more = block + kBlockKeys < after;
    const int64_t i0 = tile.first_row(layout, block), count = tile.rows - i0;
    const void* const* values = rows + kBlockKeys;
    if (more) {
      find_rows(job, layout, tile, block + kBlockKeys, smaller(after, limit), work.zeros, next);
      memcpy(rows + 2 * kBlockKeys, next, sizeof(void*) * kBlockKeys);
    }
    // The values of this block, then the keys of the next one.
    Ahead ahead(values, more ? 2 * kBlockKeys : seen, bytes);
    for (int64_t j = 0; j < seen; j += kPanel) {
      for (int64_t h = 0; h < tile.heads; ++h) {
        const int64_t at = h * tile.rows + i0;
        pack_keys<Kind>(rows + j, h * H, steps, work.panel, &ahead);
        multiply_keys<Kind>(work.q + at * steps, steps, work.panel, steps,
                            work.scores + at * kBlockKeys + j, kBlockKeys, count, &ahead);
      }
    }
    const int64_t low = larger(0, first - block);
    for (int64_t h = 0; h < tile.heads; ++h) {
      const State state = states.from(layout, h * stride);
      for (int64_t i = i0; i < tile.rows; ++i) {
        const int64_t high = smaller(seen, tile.limit(layout, i) - block);
        const int64_t at = h * tile.rows + i;
        work.keep[at] = soften<Kind>(work.scores + at * kBlockKeys, low, high, scale, fresh,
                                     state.top + i, state.sum + i);
      }
    }
    const int64_t value_steps = ceil_div(seen, Kind::kStep);
    for (int64_t h = 0; h < tile.heads; ++h) {
      const State state = states.from(layout, h * stride + i0);
      const int64_t at = h * tile.rows + i0;
      const uint32_t* weights = reinterpret_cast<const uint32_t*>(work.scores + at * kBlockKeys);
      for (int64_t column = 0; column < H; column += kPanel) {
        multiply_values<Kind>(weights, kBlockKeys,
                              typename Kind::Values(values, h * H + column, (h + 1) * H),
                              work.panel, value_steps, state.values + column, layout.width,
                              fresh ? nullptr : work.keep + at, count, &ahead);
      }
    }
    ahead.fetch_rest();
    const void** const swap = rows;
    rows = next;
    next = swap;
  }
}

// Row `i` of `total` becomes its merge with row `j` of the piece that follows.
void merge_row(const Layout& layout, const State& total, int64_t i, const State& piece, int64_t j) {
  const float before = total.top[i], after = piece.top[j];
  const float top = before > after ? before : after;
  const Vec a = exp2_negative(Vec::set(before - top)), b = exp2_negative(Vec::set(after - top));
  float pair[2][Vec::width];
  a.store(pair[0]);
  b.store(pair[1]);
  total.top[i] = top;
  total.sum[i] = total.sum[i] * pair[0][0] + piece.sum[j] * pair[1][0];
  float* to = total.values + i * layout.width;
  const float* from = piece.values + j * layout.width;
  for (int64_t d = 0; d < layout.width; d += Vec::width) {
    fma(Vec::load(to + d), a, Vec::load(from + d) * b).store(to + d);
  }
}

// Write the result of a row: number `row` among the rows of its sequence.
void finish_row(const AttentionJob& job, const Layout& layout, const AttentionSequence& s,
                int64_t head, int64_t row, float sum, const float* values) {
  const int64_t H = job.head_size;
  const int64_t p = s.row + row / layout.group, n = head * layout.group + row % layout.group;
  const Vec share = Vec::set(1.0f / sum);
  const float* gate = job.gated ? job.q + p * layout.q_stride + n * 2 * H + H : nullptr;
  float* out = job.out + (p * job.heads + n) * H;
  for (int64_t d = 0; d < H; d += Vec::width) {
    const int left = static_cast<int>(smaller(Vec::width, H - d));
    Vec x = Vec::load(values + d) * share;
    if (gate) x = x * sigmoid(Vec::load(gate + d, left));
    x.store(out + d, left);
  }
}

// The queries of a tile, normed, rotated and packed.
template <class Kind>
void load_queries(const AttentionJob& job, const Layout& layout, const Tile& tile,
                  const Workspace& work) {
  const int64_t H = job.head_size, stride = job.gated ? 2 * H : H;
  uint32_t* to = work.q;
  for (int64_t h = 0; h < tile.heads; ++h) {
    for (int64_t i = 0; i < tile.rows; ++i, to += H / Kind::kStep) {
      const int64_t row = tile.row + i;
      const int64_t p = tile.sequence->row + row / layout.group;
      const int64_t n = (tile.head + h) * layout.group + row % layout.group;
      const float* q = job.q + p * layout.q_stride + n * stride;
      // Mostly that of another head of this token; with its gate, which stays in the second cache.
      if (n + kRowsAhead < job.heads) prefetch_row(q + kRowsAhead * stride, stride);
      if (job.q_norm) {
        norm_head(q, H, job.q_norm, job.eps, work.row);
      } else {
        memcpy(work.row, q, sizeof(float) * H);
      }
      rotate_head(work.row, job.rotary, job.cos + p * job.rotary, job.sin + p * job.rotary);
      Kind::pack_row(work.row, H, to);
    }
  }
}

// All pieces of a tile of one head by one thread.
template <class Kind>
void whole_tile(const AttentionJob& job, const Layout& layout, const Tile& tile, Workspace* work) {
  load_queries<Kind>(job, layout, tile, *work);
  const int64_t limit = tile.limit(layout), first = tile.first_piece();
  const int64_t last = tile.last_piece(limit);
  walk_piece<Kind>(job, layout, tile, first, true, limit, *work, work->total, tile.rows);
  for (int64_t piece = first + 1; piece <= last; ++piece) {
    walk_piece<Kind>(job, layout, tile, piece, false, limit, *work, work->piece, tile.rows);
    for (int64_t i = tile.first_row(layout, piece * kPiece); i < tile.rows; ++i) {
      merge_row(layout, work->total, i, work->piece, i);
    }
  }
  for (int64_t i = 0; i < tile.rows; ++i) {
    finish_row(job, layout, *tile.sequence, tile.head, tile.row + i, work->total.sum[i],
               work->total.values + i * layout.width);
  }
}

// The share of one thread in the sequences that are cut into pieces: a contiguous run of them.
template <class Kind>
void split_tiles(const AttentionJob& job, const Layout& layout, const Plan& plan,
                 const Scratch& shared, const Team& team, Workspace* work) {
  const int64_t begin = plan.split_cost * team.thread / team.threads;
  const int64_t end = plan.split_cost * (team.thread + 1) / team.threads;
  int64_t passed = 0, states = 0;
  for (int64_t b = 0; b < job.count && passed < end; ++b) {
    const AttentionSequence& s = job.sequences[b];
    const Share share(layout, s);
    if (!share.split(plan.total, team.threads)) continue;
    const bool together = plan.pieces >= kPiecesPerThread * team.threads &&
                          share.rows * job.kv_heads <= kTileRows;
    const int64_t heads = together ? job.kv_heads : 1, stride = share.pieces * share.rows;
    for (int64_t g = 0; g < job.kv_heads; g += heads) {
      for (int64_t row = 0; row < share.rows; row += kTileRows) {
        const Tile tile = share.tile(g, heads, row);
        const int64_t limit = tile.limit(layout), last = tile.last_piece(limit);
        bool loaded = false;
        for (int64_t piece = tile.first_piece(); piece <= last; ++piece) {
          const int64_t from = larger(piece * kPiece, s.first);
          const int64_t until = smaller(limit, (piece + 1) * kPiece);
          // A piece belongs to the thread in whose share of the cost its middle lies.
          const int64_t own = heads * tile.rows * (until - from), middle = passed + own / 2;
          const bool mine = begin <= middle && middle < end;
          passed += own;
          if (!mine) continue;
          if (!loaded) load_queries<Kind>(job, layout, tile, *work);
          State state = work->piece;
          if (share.pieces > 1) {
            state = shared.split.from(layout, states + g * stride + piece * share.rows + row);
          }
          // How far this thread will go in this tile: what to fetch ahead of time.
          walk_piece<Kind>(job, layout, tile, piece, !loaded, passed < end ? limit : until, *work,
                           state, share.pieces > 1 ? stride : tile.rows);
          loaded = true;
          for (int64_t at = 0; share.pieces == 1 && at < heads * tile.rows; ++at) {
            finish_row(job, layout, s, g + at / tile.rows, row + at % tile.rows, state.sum[at],
                       state.values + at * layout.width);
          }
        }
      }
    }
    if (share.pieces > 1) states += share.rows * share.pieces * job.kv_heads;
  }
}

// Merge the pieces of every row of the split sequences.
void merge_split(const AttentionJob& job, const Layout& layout, const Plan& plan,
                 const Scratch& shared, const Team& team) {
  int64_t states = 0;
  for (int64_t b = 0; b < job.count; ++b) {
    const AttentionSequence& s = job.sequences[b];
    const Share share(layout, s);
    if (!share.split(plan.total, team.threads) || share.pieces == 1) {
      continue;
    }
    int64_t begin, end;
    team.range(share.rows * job.kv_heads, 1, &begin, &end);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t g = at / share.rows, row = at % share.rows;
      const int64_t last = (s.before + row / layout.group) / kPiece;
      const int64_t base = states + g * share.pieces * share.rows + row;
      const int64_t first = base + s.first / kPiece * share.rows;
      for (int64_t piece = s.first / kPiece + 1; piece <= last; ++piece) {
        merge_row(layout, shared.split, first, shared.split, base + piece * share.rows);
      }
      finish_row(job, layout, s, g, row, shared.split.sum[first],
                 shared.split.values + first * layout.width);
    }
    states += share.rows * share.pieces * job.kv_heads;
  }
}

template <class Kind>
void attend_as(const AttentionJob& job, const Layout& layout, const Plan& plan,
               const Scratch& shared, Team& team, Workspace* work) {
  if (plan.split_cost) split_tiles<Kind>(job, layout, plan, shared, team, work);
  for (;;) {
    int64_t number = plan.whole_tiles ? shared.counter->next() : 0;
    if (number >= plan.whole_tiles) break;
    for (int64_t b = 0; b < job.count; ++b) {
      const AttentionSequence& s = job.sequences[b];
      const Share share(layout, s);
      if (share.split(plan.total, team.threads)) continue;
      if (number < share.tiles * job.kv_heads) {
        // The latest first: they take longest.
        const int64_t row = (share.tiles - 1 - number / job.kv_heads) * kTileRows;
        whole_tile<Kind>(job, layout, share.tile(number % job.kv_heads, 1, row), work);
        break;
      }
      number -= share.tiles * job.kv_heads;
    }
  }
  if (plan.merged) {
    team.barrier();
    merge_split(job, layout, plan, shared, team);
  }
}

void attend(const AttentionJob& job, void* scratch, Team& team) {
  const Layout layout(job);
  const Plan plan(job, layout, team.threads);
  Cutter cut{reinterpret_cast<uintptr_t>(scratch)};
  const Scratch shared(&cut, layout, plan);
  Cutter own{shared.own + team.thread * workspace_bytes(job, layout)};
  Workspace work(&own, job, layout);
  memset(work.zeros, 0, layout.position);
#if defined(QNEXT_ISA_avx512)
  using Bf16 = Pairs;
#else
  using Bf16 = Floats<bf16>;
#endif
  if (job.type == CacheType::bf16) {
    attend_as<Bf16>(job, layout, plan, shared, team, &work);
  } else {
    attend_as<Floats<float>>(job, layout, plan, shared, team, &work);
  }
}

}  // namespace

const AttentionKernels attention_kernels = {scratch_bytes, append, attend};

}  // namespace qnext::QNEXT_ISA
