// Attention forward for Hopper (sm_90a).
//
// COMPUTES  O = softmax(scale * Q K^T + mask) V and LSE = ln(sum(exp(scale * Q K^T + mask))) per row.
//   Q, O (batch, seqlen_q, heads_q, d), K, V (batch, seqlen_k, heads_q / group_size, d), 16 bit, any strides that TMA
//   takes (host: tma.py); LSE (batch, heads_q, seqlen_q) fp32. Or packed sequences, whose lengths only the device knows:
//   (total, heads, d), LSE (heads_q, total). d <= head_dim: TMA fills the rest with zeros and drops
//   it again; V and O may have another d. Mask: two diagonals (mask.cuh), either of which may be missing. Scores may be
//   changed, and sinks join the sums (score.cuh); a scale that is not positive is such a change. Not handled: d % 8 != 0.
//
// GRID AND ORDER  One persistent CTA per SM, at most one per tile. A tile is 64 * consumers query rows of one head and
//   all keys they see, from the last block of tile_n keys to the first, so that masked blocks come first; blocks that no
//   row sees are not loaded. The order of tiles is arithmetic (schedule.cuh): every role computes it for itself, but of
//   packed sequences, whose tiles one thread finds.
//
// DATA FLOW
//   Q, K, V -TMA-> smem (128-byte swizzle) -WGMMA SS-> S (registers) -softmax-> P (registers, 16 bit)
//   P, V -WGMMA RS-> O (registers) -stmatrix-> smem -TMA-> O;   LSE -st.global->
//
// WARP ROLES AND REGISTERS
//   warpgroup 0: thread 0 fills the ring with K and V, thread 32 fills the Q buffers, thread 64 a second ring if the keys
//   are shared out, or walks along packed sequences and says to all which tiles there are; warp 3 clears the rows that
//   belong to none of them; the others leave.
//   warpgroups 1..consumers: 64 query rows each, or (key_parts 2) the same 64 rows and every other block of keys.
//   setmaxnreg, threads x registers of a CTA:
//     2 consumers: (40 + 2 * 232) * 128 = 64,512   3 consumers: (32 + 3 * 160) * 128 = 65,536   of 65,536
//     4 consumers: (32 + 4 * 112) * 128 = 61,440, all that 640 threads are launched with
//     1 consumer: 2 * 128 threads may have 255 each, nothing to move.
//   Live in a consumer: O head_dim / 2, S tile_n / 2, P tile_n / 4, and about 30 more: 64 + 64 + 32 + 30 = 190 at
//   head_dim 128, tile_n 128; 32 + 64 + 32 + 30 = 158 at head_dim 64 with three consumers; 32 + 32 + 16 + 30 = 110 with
//   four and tile_n 64.
//
// SHARED MEMORY (ForwardSmem), bytes at head_dim 128, tile 128 x 128, 4 stages, 3 Q buffers
//   q[q_buffers][consumers]   98,304   a warpgroup's Q; with several buffers it turns into its O when its tile ends
//   kv[stages]               131,072   the ring: one block of K or V a slot. With one Q buffer a slot per warpgroup is
//                                      lent to it for its O after the last V of a tile
//   barriers                     160
//   tiles (packed)               112   the next two, for all roles
//
// BARRIERS (mbarrier; first use: producers find "empty" passed, consumers wait for phase 0)
//   name              arrivals per phase          bytes       waited for by   protects
//   ring.full[s]      1, thread 0                 one block   consumers       slot s filled (lent slot: no bytes)
//   ring.empty[s]     1 per consumer warpgroup    -           thread 0        slot s read by all
//   q_full[b][w]      1, thread 32                64 rows     warpgroup w     its Q
//   q_empty[b][w]     1, warpgroup w              -           thread 32       one Q buffer: last Q K^T done;
//                                                                             several: its O read by the copy engine
//   tiles.full[s]     1, thread 64                -           all roles       packed: a tile to come
//   tiles.empty[s]    1 per thread that reads     -           thread 64       its slot read by all
//   named 1..c: warpgroup w's turn to issue; c+1..2c: the warps of one warpgroup. (c = consumers)
//
// SCHEDULE  Consumers issue S(n) = Q K(n)^T and then O += P(n+1) V(n+1), so that the second product runs under the
//   softmax of the first. The ring has the blocks in that order: K(n), V(n+1), K(n-1), V(n), ... also across tiles:
//   the first Q K^T of the next tile and the last P V of this one are such a pair (cross_seam). Two warpgroups:
//     tensor cores   S0 O0   S1 O1   S0' O0'   S1' O1'      S0, O0: products of warpgroup 0
//     warpgroup 0       softmax(S0)..... |  softmax(S0')..    | its turn to issue again
//     warpgroup 1               softmax(S1)..... |
//   Few tiles: with a CTA for every tile (one_tile) there is no seam and no code for it. Then two warpgroups may share 64
//   rows (key_parts), each with a ring and every other block; at the end the second leaves its O, maxima and sums in its
//   ring, and the first adds them to its own.
//   In a window (a left bound) the ring has the last V of a tile before the first K of the next: warpgroups further down
//   pass over the leftmost blocks, further up over the rightmost. A tile's output leaves under the next Q K^T.
//   A warpgroup passes over blocks of its tile that lie right of its own diagonal (open_tile, close_tile), and where the
//   diagonal leaves it half a block, it computes half of Q K^T and of the softmax.
//
// NUMERICS  softmax.cuh. S, O and the row sums are fp32, P is rounded to 16 bit, O once at the end. A row without keys
//   gives O = 0 and LSE = -inf. Keys past the end read as 0 and are masked; masked scores are replaced, so that NaN or
//   infinity in a hidden K does not matter. A hidden V in a block that others see is multiplied by 0, and 0 * NaN is
//   NaN, as with PyTorch's kernels.
//
// EVIDENCE  docs/log/0001 (order of tiles), 0002 (diagonal), 0003 (table), 0020 (windows, scores). FlashAttention-3 (arXiv 2407.08608) for the
//   overlap of softmax and products, FlashAttention-2 (arXiv 2307.08691) for the online softmax over key blocks.
#pragma once
#include "../core/ring.cuh"
#include "../ptx/wgmma.cuh"
#include "../ptx/wgmma_sync.cuh"
#include "box.cuh"
#include "schedule.cuh"
#include "score.cuh"
#include "softmax.cuh"

template <class Config> struct ForwardSmem {
  using QTile = SmemTile<64, Config::head_dim>;    // one warpgroup's rows of Q
  using OTile = SmemTile<64, Config::head_dim_v>;  // the same rows of O
  using KTile = SmemTile<Config::tile_n, Config::head_dim>;
  using VTile = SmemTile<Config::tile_n, Config::head_dim_v>;
  // Where a warpgroup's O waits for the copy engine: in the ring, or in the Q buffer of its own tile.
  static constexpr bool o_in_ring = Config::q_buffers == 1 && !Config::one_tile;
  static constexpr int q_bytes = o_in_ring || QTile::bytes > OTile::bytes ? QTile::bytes : OTile::bytes;
  static constexpr int kv_bytes = KTile::bytes > VTile::bytes ? KTile::bytes : VTile::bytes;
  static_assert(!o_in_ring || kv_bytes >= OTile::bytes);

  alignas(1024) u8 q[Config::q_buffers][Config::row_groups][q_bytes];
  alignas(1024) u8 kv[Config::key_parts][Config::stages][kv_bytes];
  RingBarriers<Config::stages> ring[Config::key_parts];
  u64 q_full[Config::q_buffers][Config::row_groups];
  u64 q_empty[Config::q_buffers][Config::row_groups];
  TileQueue<Config::packed> tiles;
};

template <class Config> struct ForwardKernel {
  using Smem = ForwardSmem<Config>;
  using QTile = typename Smem::QTile;
  using OTile = typename Smem::OTile;
  using KTile = typename Smem::KTile;
  using VTile = typename Smem::VTile;
  using Params = AttentionParams<Config>;
  using Element = typename Config::Element;
  using KvCursor = RingCursor<Config::stages>;
  using QCursor = RingCursor<Config::q_buffers>;

  static constexpr int tile_n = Config::tile_n;
  static constexpr int head_dim = Config::head_dim;
  static constexpr int head_dim_v = Config::head_dim_v;
  static constexpr int consumers = Config::consumers;
  static constexpr int row_groups = Config::row_groups;
  static constexpr int key_parts = Config::key_parts;
  static constexpr bool o_in_ring = Smem::o_in_ring;
  // Whether the last P V of a tile is under way with the first Q K^T of the next.
  static constexpr bool seams = !Config::one_tile && !Config::bounded_left;
  static_assert(sizeof(Smem) == Config::smem_bytes, "the host and the kernel disagree on shared memory");
  static_assert(Config::tile_m == 64 * row_groups && consumers == row_groups * key_parts);
  static_assert(key_parts == 1 || (Config::one_tile && row_groups == 1));
  static_assert(key_parts == 1 || Config::stages * Smem::kv_bytes >= (head_dim_v / 8 + 1) * 128 * 16);
  // The diagonal leaves a warpgroup only the left half of every second block. With one tile a CTA, code costs more.
  static constexpr int narrow_n = Config::bounded_right && tile_n == 128 && !Config::one_tile ? tile_n / 2 : tile_n;

  Smem& smem;
  const Params& params;

  // The tiles of this CTA, in order.
  static __forceinline__ auto tiles(Smem& smem, const Params& params) {
    if constexpr (Config::packed) return PackedTiles<Config>{smem.tiles, {}};
    else return TileScheduler<Config>{params};
  }

  static __forceinline__ void wait(u64& barrier, u32 parity) { mbarrier_wait<Config::wait_limit>(barrier, parity); }

  // ---- producers: one thread for Q, one for the ring ---------------------------------------------------------------

  void load_q(const TensorMap& map) {
    auto scheduler = tiles(smem, params);
    QCursor cursor;
    Tile tile;
    while (scheduler.next(tile)) {
#pragma unroll
      for (int wg = 0; wg < row_groups; ++wg) {
        wait(smem.q_empty[cursor.stage][wg], cursor.phase ^ 1);
        u64& full = smem.q_full[cursor.stage][wg];
        mbarrier_arrive_expect_tx(full, QTile::bytes);
        const int length = queries_of(params, tile), row = tile.row + wg * 64;
#pragma unroll
        for (int c = 0; c < QTile::chunks; ++c)  // no box may begin before row 0; past the end it reads zeros
          load_box<Config::packed>(smem.q[cursor.stage][wg] + c * QTile::chunk_bytes, map, full, c,
                                   row < 0 ? length : row, tile.head, tile.batch, tile.first_q, length);
      }
      cursor.advance();
    }
  }

  template <class KvTile>
  __forceinline__ void load_block(const TensorMap& map, int part, KvCursor& cursor, const Tile& tile, int n_block) {
    wait(smem.ring[part].empty[cursor.stage], cursor.phase ^ 1);
    u64& full = smem.ring[part].full[cursor.stage];
    mbarrier_arrive_expect_tx(full, KvTile::bytes);
#pragma unroll
    for (int c = 0; c < KvTile::chunks; ++c)
      load_box<Config::packed>(smem.kv[part][cursor.stage] + c * KvTile::chunk_bytes, map, full, c, n_block * tile_n,
                               tile.kv_head, tile.batch, tile.first_k, tile.length_k);
    cursor.advance();
  }

  __forceinline__ void load_last_v(const TensorMap& v, int part, KvCursor& cursor, const Tile& tile) {
    load_block<VTile>(v, part, cursor, tile, tile.n_begin + (tile.n_end - 1 - part - tile.n_begin) % key_parts);
    if constexpr (o_in_ring)  // lend a slot to every warpgroup for its O
      for (int wg = 0; wg < consumers; ++wg) {
        wait(smem.ring[0].empty[cursor.stage], cursor.phase ^ 1);
        mbarrier_arrive(smem.ring[0].full[cursor.stage]);
        cursor.advance();
      }
  }

  // In the order in which the consumers need them: K of a block comes before V of the block ahead of it.
  void load_kv(const TensorMap& k, const TensorMap& v, int part) {
    auto scheduler = tiles(smem, params);
    KvCursor cursor;
    Tile tile, previous;
    bool first = true;
    while (scheduler.next(tile)) {
      const int rightmost = tile.n_end - 1 - part;
      if (rightmost < tile.n_begin) return;  // no block for this part
      load_block<KTile>(k, part, cursor, tile, rightmost);
      if (seams && !first) load_last_v(v, part, cursor, previous);
      for (int n_block = rightmost - key_parts; n_block >= tile.n_begin; n_block -= key_parts) {
        load_block<KTile>(k, part, cursor, tile, n_block);
        load_block<VTile>(v, part, cursor, tile, n_block + key_parts);
      }
      if (!seams) load_last_v(v, part, cursor, tile);
      previous = tile;
      first = false;
    }
    if (seams && !first) load_last_v(v, part, cursor, previous);
  }

  // ---- packed sequences: which tiles there are, and rows of none -----------------------------------------------------

  void send_tiles() {
    if constexpr (Config::packed) tiles(smem, params).send(params);
  }

  // Their output is 0 and their LSE -inf. They are before the first sequence, behind the last, and where a sequence does not
  // use its rows. For one warp of each CTA.
  void clear_gaps() {
    if constexpr (Config::packed) {
      const Rows& queries = params.sequences.queries;
      const int lane = threadIdx.x % 32, row_bytes = params.heads_q * params.sequences.head_bytes;
      for (int b = -1; b < params.batch; ++b) {
        const int end = queries.gap_end(b, params.batch);
        for (int row = queries.gap_begin(b) + blockIdx.x; row < end; row += gridDim.x) {
          clear_rows(params.sequences.of_queries, row_bytes, row, row + 1, row_bytes, lane, 32);
          for (int head = lane; params.lse != nullptr && head < params.heads_q; head += 32)
            params.lse[u64(head) * queries.total + row] = negative_infinity();
        }
      }
    }
  }

  // ---- consumer: one warpgroup -------------------------------------------------------------------------------------

  struct Consumer {
    Smem& smem;
    const Params& params;
    const TensorMap& o_map;
    const int wg, part;  // its 64 rows of the tile, its share of the keys
    const int thread;
    const int warp_row;  // first row of this warp in the CTA tile
    KvCursor cursor;
    QCursor q_cursor;  // of the current tile
    Softmax softmax;
    u64* stored = nullptr;  // barrier to arrive at when the copy engine has read the staged O; null: none staged

    float o[head_dim_v / 2];
    u32 p[tile_n / 4];

    // n: scores per thread, for the first 2 n keys of the block at the cursor.
    template <int n> __forceinline__ void issue_qk(float (&s)[n]) {
      const u32 q = smem_address(smem.q[q_cursor.stage][wg]);
      const u32 k = smem_address(smem.kv[part][cursor.stage]);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < head_dim / 16; ++step)
        Wgmma<Element, 2 * n>::template ss<0, 0>(s, QTile::k_major(q, step), KTile::k_major(k, step), step > 0);
      wgmma_commit();
    }

    __forceinline__ void issue_pv(int stage, bool accumulate) {
      const u32 v = smem_address(smem.kv[part][stage]);
      pin(o);
      pin(p);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < tile_n / 16; ++step)
        Wgmma<Element, head_dim_v>::template rs<1>(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3],
                                                   VTile::mn_major(v, step), step > 0 || accumulate);
      wgmma_commit();
    }

    // Waits for the block at the cursor, and returns its slot.
    __forceinline__ int acquire() {
      const int stage = cursor.stage;
      wait(smem.ring[part].full[stage], cursor.phase);
      return stage;
    }

    // One thread speaks for the warpgroup, so all four warps must have seen the slot full: a matrix product of theirs
    // or sync_warpgroup() comes between acquire() and release(), or a late warp could miss the phase.
    __forceinline__ void release(int stage) {
      if (thread == 0) mbarrier_arrive(smem.ring[part].empty[stage]);
    }

    __forceinline__ void sync_warpgroup() { named_barrier_sync(1 + consumers + wg, 128); }

    __forceinline__ void pass_over() {
      const int stage = acquire();
      cursor.advance();
      sync_warpgroup();
      release(stage);
    }

    // Q K^T of a block is done: its K is not needed any more, and after the warpgroup's last block neither is Q.
    __forceinline__ void release_k(int stage, bool last) {
      release(stage);
      if (o_in_ring && last && thread == 0) mbarrier_arrive(smem.q_empty[q_cursor.stage][wg]);
    }

    // Warpgroups take turns at issuing, once per block, so that one computes its softmax while the tensor cores work
    // for another. All take the same number of turns, whether they use them or not.
    __forceinline__ void await_turn() {
      if constexpr (Config::turns) named_barrier_sync(1 + wg, 256);
    }
    __forceinline__ void pass_turn() {
      if constexpr (Config::turns) named_barrier_arrive(1 + (wg + 1) % consumers, 256);
    }

    __forceinline__ int first_row(const Tile& tile) const { return tile.row + wg * 64; }

    // Where the keys end that this warpgroup needs of a tile; at least 1.
    __forceinline__ int keys(const Tile& tile) const {
      if (u32(first_row(tile)) >= u32(queries_of(params, tile))) return 1;  // no row of its own
      return max(1, mask_of(params, tile).end(first_row(tile) + 63));
    }

    // Its rightmost block; those of the tile beyond it are for warpgroups further down.
    __forceinline__ int first_block(const Tile& tile) const { return max(tile.n_begin, (keys(tile) - 1) / tile_n); }

    // Its leftmost block; those of the tile beyond it are for warpgroups further up.
    __forceinline__ int last_block(const Tile& tile) const {
      if constexpr (!Config::bounded_left) return 0;
      return min(max(tile.n_begin, mask_of(params, tile).begin(first_row(tile)) / tile_n), first_block(tile));
    }
    __forceinline__ bool narrow(const Tile& tile) const {
      return narrow_n < tile_n && keys(tile) <= first_block(tile) * tile_n + narrow_n;
    }

    // Scores become what the problem makes of them, and those of keys that a row does not see -inf.
    template <int n> __forceinline__ void finish_scores(float (&s)[n], const Tile& tile, int n_block) {
      const int first = tile.row + warp_row;
      const int row = first + thread % 32 / 4;
      const int col = n_block * tile_n + 2 * (thread % 4);
      if constexpr (!Score::plain) {
        const float row_f[2] = {float(row), float(row + 8)}, col_f = float(col);
#pragma unroll
        for (int group = 0; group < n / 8; ++group) {
          float x[8];
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const int i = 8 * group + j, slot = fragment_slot(i);
            x[j] = params.score.apply(s[i], tile.batch, tile.head, row + 8 * slot, col + fragment_col(i), row_f[slot],
                                      col_f + fragment_col(i), keys_of(params, tile) - queries_of(params, tile));
          }
          pin(x);  // or addresses and half-done scores of all groups are live at once
#pragma unroll
          for (int j = 0; j < 8; ++j) s[8 * group + j] = x[j];
        }
      }
      const auto& mask = mask_of(params, tile);
      hide_right(s, mask.end(first) - n_block * tile_n, mask.end(row) - col, mask.end(row + 8) - col);
      if constexpr (Config::bounded_left)
        hide_left(s, mask.begin(first + 15) - n_block * tile_n, mask.begin(row) - col, mask.begin(row + 8) - col);
    }

    // From column clear on some row of the warp hides keys: 16 columns at a time.
    template <int n> __forceinline__ void hide_right(float (&s)[n], int clear, int end_0, int end_1) {
      if (clear >= 2 * n) return;
      const int end[2] = {end_0, end_1};
#pragma unroll
      for (int group = 0; group < n / 8; ++group)
        if (clear < 16 * (group + 1)) {
#pragma unroll
          for (int i = 8 * group; i < 8 * group + 8; ++i)
            if (fragment_col(i) >= end[fragment_slot(i)]) s[i] = negative_infinity();
        }
    }

    // The same before column clear.
    template <int n> __forceinline__ void hide_left(float (&s)[n], int clear, int begin_0, int begin_1) {
      if (clear <= 0) return;
      const int begin[2] = {begin_0, begin_1};
#pragma unroll
      for (int group = 0; group < n / 8; ++group)
        if (clear > 16 * group) {
#pragma unroll
          for (int i = 8 * group; i < 8 * group + 8; ++i)
            if (fragment_col(i) < begin[fragment_slot(i)]) s[i] = negative_infinity();
        }
    }

    template <int n> __forceinline__ void pack(const float (&s)[n]) {
#pragma unroll
      for (int i = 0; i < tile_n / 4; ++i) p[i] = 2 * i < n ? pack2<Element>(s[2 * i % n], s[2 * i % n + 1]) : 0;
    }

    __forceinline__ int total_queries() const {
      if constexpr (Config::packed) return params.sequences.queries.total;
      return 0;
    }

    // The staged O's place returns to the producer once the copy engine has read it.
    __forceinline__ void finish_store() {
      if (stored == nullptr) return;
      if (thread == 0) {
        tma_store_wait_read<0>();
        mbarrier_arrive(*stored);
      }
      stored = nullptr;
    }

    __forceinline__ Denominator denominator_of(const Tile& tile, float row_max, float sum) const {
      if constexpr (Score::has_sink) return {row_max, sum, softmax.scale_log2, params.score.sink(tile.head)};
      return {row_max, sum, softmax.scale_log2};
    }

    __forceinline__ void epilogue(const Tile& tile, int q_buffer, const float (&row_max)[2],
                                  const float (&row_sum)[2]) {
      const float sum[2] = {quad_sum(row_sum[0]), quad_sum(row_sum[1])};
      const Denominator denominator[2] = {denominator_of(tile, row_max[0], sum[0]),
                                          denominator_of(tile, row_max[1], sum[1])};
#pragma unroll
      for (int i = 0; i < head_dim_v / 2; ++i) o[i] *= denominator[fragment_slot(i)].inverse;
      // A row without keys is 0 whatever V holds (0 times NaN or infinity would not be).
      if (__any_sync(full_warp, sum[0] == 0 || sum[1] == 0)) {
#pragma unroll
        for (int i = 0; i < head_dim_v / 2; ++i)
          if (sum[fragment_slot(i)] == 0) o[i] = 0;
      }
      u8* staged = smem.q[q_buffer][wg];
      stored = &smem.q_empty[q_buffer][wg];
      if constexpr (o_in_ring)
        for (int owner = 0; owner < consumers; ++owner) {
          if (owner != wg) {
            pass_over();
            continue;
          }
          const int stage = acquire();
          cursor.advance();
          staged = smem.kv[0][stage];
          stored = &smem.ring[0].empty[stage];
        }
      store_fragment<Element, head_dim_v>(o, smem_address(staged), thread);
      fence_async_proxy();
      sync_warpgroup();
      if (thread == 0) {
#pragma unroll
        for (int c = 0; c < OTile::chunks && first_row(tile) >= 0; ++c)
          store_box<Config::packed>(o_map, staged + c * OTile::chunk_bytes, c, first_row(tile), tile.head, tile.batch,
                                    tile.first_q, tile.length_q);
        tma_store_commit();
      }
      if (params.lse != nullptr && thread % 4 == 0) {
        const u64 row_base = Config::packed ? u64(tile.head) * total_queries() + tile.first_q
                                            : (u64(tile.batch) * params.heads_q + tile.head) * params.seqlen_q;
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) {
          const int row = first_row(tile) + fragment_row(thread) + 8 * slot;
          if (u32(row) < u32(queries_of(params, tile))) params.lse[row_base + row] = denominator[slot].lse;
        }
      }
    }

    // First block of a tile (its first `width` keys) with no product of an earlier tile in flight: for the CTA's first
    // tile, for tiles whose rightmost blocks this warpgroup passes over, and where tiles have no seams.
    template <int width> __forceinline__ void open_tile(const Tile& tile, int n_block, bool first_in_ring) {
      wait(smem.q_full[q_cursor.stage][wg], q_cursor.phase);
      const int skipped = key_parts > 1 ? 0 : tile.n_end - 1 - n_block;
      if (first_in_ring && skipped > 0) pass_over();  // else close_tile() did
      for (int i = 1; i < skipped; ++i) {
        finish_store();
        await_turn();
        pass_turn();
        pass_over();
        pass_over();
      }
      const int k_stage = acquire();
      const bool turn = !first_in_ring || skipped > 0;
      if (turn) await_turn();
      float s[width / 2];
      issue_qk(s);
      if (turn) pass_turn();
      cursor.advance();
      finish_store();
      wgmma_wait<0>();
      pin(s);
      release_k(k_stage, n_block == last_block(tile));
      if (skipped > 0) pass_over();
      finish_scores(s, tile, n_block);
      softmax.start(s);
      pack(s);
    }

    // Block n_block of the tile, with the product of block n_block + 1 under its softmax.
    __forceinline__ void next_block(const Tile& tile, int n_block, bool accumulate) {
      float s[tile_n / 2];
      const int k_stage = acquire();
      await_turn();
      issue_qk(s);
      cursor.advance();
      finish_store();
      const int v_stage = acquire();
      cursor.advance();
      issue_pv(v_stage, accumulate);
      pass_turn();
      wgmma_wait<1>();
      pin(s);
      release_k(k_stage, n_block == last_block(tile));
      finish_scores(s, tile, n_block);
      const bool grew = softmax.update(s);
      wgmma_wait<0>();
      pin(o);
      pin(p);
      release(v_stage);
      pack(s);
      if (grew) softmax.rescale_output(o);
    }

    // Last product of a tile without a seam.
    __forceinline__ void finish_products(bool accumulate) {
      const int v_stage = acquire();
      cursor.advance();
      issue_pv(v_stage, accumulate);
      wgmma_wait<0>();
      pin(o);
      pin(p);
      release(v_stage);
    }

    // Last product of a tile, and its output.
    __forceinline__ void close_tile(const Tile& tile, bool accumulate, bool followed) {
      finish_store();
      if (followed) pass_over();  // K of the next tile's first block, which this warpgroup does not need
      const int v_stage = acquire();
      cursor.advance();
      if (followed) await_turn();
      issue_pv(v_stage, accumulate);
      if (followed) pass_turn();
      wgmma_wait<0>();
      pin(o);
      pin(p);
      release(v_stage);
      epilogue(tile, q_cursor.stage, softmax.row_max, softmax.row_sum);
      q_cursor.advance();
    }

    // The only tile: this warpgroup's share of its blocks, and the output of all shares.
    __forceinline__ void only_tile(const Tile& tile) {
      const int first = key_parts > 1 ? tile.n_end - 1 - part : first_block(tile);
      if (first >= tile.n_begin) {
        open_tile<tile_n>(tile, first, true);
        for (int n_block = first - key_parts; n_block >= tile.n_begin; n_block -= key_parts)
          next_block(tile, n_block, n_block < first - key_parts);
        finish_products(first - tile.n_begin >= key_parts);
      } else {
        softmax.row_max[0] = softmax.row_max[1] = negative_infinity();
        softmax.row_sum[0] = softmax.row_sum[1] = 0;
#pragma unroll
        for (int i = 0; i < head_dim_v / 2; ++i) o[i] = 0;
      }
      if constexpr (key_parts > 1) {
        if (part > 0) return leave_share();
        take_share();
      }
      epilogue(tile, 0, softmax.row_max, softmax.row_sum);
    }

    // The other warpgroup's thread with the same number holds the same elements. Its ring is empty by now.
    __forceinline__ float4* share() const { return reinterpret_cast<float4*>(smem.kv[key_parts - 1]) + thread; }

    __forceinline__ void leave_share() {
      share()[0] = make_float4(softmax.row_max[0], softmax.row_max[1], softmax.row_sum[0], softmax.row_sum[1]);
#pragma unroll
      for (int i = 0; i < head_dim_v / 8; ++i)
        share()[128 * (i + 1)] = make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]);
      named_barrier_arrive(1 + 2 * consumers, 256);
    }

    __forceinline__ void take_share() {
      named_barrier_sync(1 + 2 * consumers, 256);
      const float4 other = share()[0];
      const float other_max[2] = {other.x, other.y}, other_sum[2] = {other.z, other.w};
      float mine[2], theirs[2];  // factors
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        const float m = fmaxf(softmax.row_max[slot], other_max[slot]);
        const float offset = m == negative_infinity() ? 0 : m;  // a row without keys: both factors are 0
        mine[slot] = exp2_approx((softmax.row_max[slot] - offset) * softmax.scale_log2);
        theirs[slot] = exp2_approx((other_max[slot] - offset) * softmax.scale_log2);
        softmax.row_sum[slot] = softmax.row_sum[slot] * mine[slot] + other_sum[slot] * theirs[slot];
        softmax.row_max[slot] = m;
      }
#pragma unroll
      for (int i = 0; i < head_dim_v / 8; ++i) {
        const float4 x = share()[128 * (i + 1)];
        const float y[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int slot = fragment_slot(4 * i + j);
          o[4 * i + j] = o[4 * i + j] * mine[slot] + y[j] * theirs[slot];
        }
      }
    }

    // The blocks of a tile in a window after its first, passing over those further left, which the warpgroups further up
    // need.
    __forceinline__ void rest_of_window(const Tile& tile) {
      const int first = first_block(tile), last = last_block(tile);
      finish_store();
      for (int n_block = first - 1; n_block >= last; --n_block) next_block(tile, n_block, n_block < first - 1);
      if (last > tile.n_begin) {
        pass_over();
        await_turn();
        pass_turn();
      }
      finish_products(first > last);
      for (int n_block = last - 2; n_block >= tile.n_begin; --n_block) {
        await_turn();
        pass_turn();
        pass_over();
        pass_over();
      }
      if (last > tile.n_begin) pass_over();
    }

    // The output of a tile in a window, with the first scores of the next one's first block under way.
    template <int width> __forceinline__ void cross_window_seam(const Tile& tile, const Tile& next) {
      const int q_buffer = q_cursor.stage;
      finish_store();
      q_cursor.advance();
      wait(smem.q_full[q_cursor.stage][wg], q_cursor.phase);
      float s[width / 2];
      const int k_stage = acquire();
      issue_qk(s);
      cursor.advance();
      epilogue(tile, q_buffer, softmax.row_max, softmax.row_sum);
      wgmma_wait<0>();
      pin(s);
      release_k(k_stage, false);
      finish_scores(s, next, next.n_end - 1);
      softmax.start(s);
      pack(s);
    }

    __forceinline__ void run_windows() {
      auto scheduler = tiles(smem, params);
      Tile tile, next;
      bool more = scheduler.next(tile), opened = false;
      while (more) {
        if (!opened && narrow(tile))
          open_tile<narrow_n>(tile, first_block(tile), true);
        else if (!opened)
          open_tile<tile_n>(tile, first_block(tile), true);
        rest_of_window(tile);
        more = scheduler.next(next);
        // With O in the ring its slots come before the next K.
        opened = !o_in_ring && more && first_block(next) == next.n_end - 1;
        if (opened && narrow(next)) {
          cross_window_seam<narrow_n>(tile, next);
        } else if (opened) {
          cross_window_seam<tile_n>(tile, next);
        } else {
          epilogue(tile, q_cursor.stage, softmax.row_max, softmax.row_sum);
          q_cursor.advance();
        }
        tile = next;
      }
    }

    // First block of the next tile, with the last product of this one under its softmax; then this one's output.
    template <int width> __forceinline__ void cross_seam(const Tile& tile, const Tile& next, bool accumulate) {
      const int q_buffer = q_cursor.stage;
      finish_store();
      q_cursor.advance();
      wait(smem.q_full[q_cursor.stage][wg], q_cursor.phase);
      float s[width / 2];
      const int k_stage = acquire();
      await_turn();
      issue_qk(s);
      cursor.advance();
      const int v_stage = acquire();
      cursor.advance();
      issue_pv(v_stage, accumulate);
      pass_turn();
      wgmma_wait<1>();
      pin(s);
      release_k(k_stage, next.n_end == 1);
      const float row_max[2] = {softmax.row_max[0], softmax.row_max[1]};
      const float row_sum[2] = {softmax.row_sum[0], softmax.row_sum[1]};
      finish_scores(s, next, next.n_end - 1);
      softmax.start(s);
      wgmma_wait<0>();
      pin(o);
      pin(p);
      release(v_stage);
      epilogue(tile, q_buffer, row_max, row_sum);
      pack(s);
    }

    void run() {
      if (Config::turns && wg == consumers - 1) pass_turn();
      if constexpr (seams) {
        run_with_seams();
      } else {
        if constexpr (Config::bounded_left && key_parts == 1) {
          run_windows();
        } else {
          auto scheduler = tiles(smem, params);
          Tile tile;
          scheduler.next(tile);
          only_tile(tile);
        }
      }
      finish_store();
    }

    __forceinline__ void run_with_seams() {
      auto scheduler = tiles(smem, params);
      Tile tile, next;
      bool more = scheduler.next(tile), opened = false, first_of_cta = true;
      while (more) {
        const int first = first_block(tile);
        if (!opened && narrow(tile))
          open_tile<narrow_n>(tile, first, first_of_cta);
        else if (!opened)
          open_tile<tile_n>(tile, first, first_of_cta);
        first_of_cta = false;
        for (int n_block = first - 1; n_block >= 0; --n_block) next_block(tile, n_block, n_block < first - 1);
        more = scheduler.next(next);
        opened = more && first_block(next) == next.n_end - 1;
        if (opened && narrow(next))
          cross_seam<narrow_n>(tile, next, first > 0);
        else if (opened)
          cross_seam<tile_n>(tile, next, first > 0);
        else
          close_tile(tile, first > 0, more);
        tile = next;
      }
    }
  };

  __forceinline__ void consume(const TensorMap& o_map, int consumer, int thread, int warp) {
    const int wg = consumer % row_groups;
    Consumer{smem, params, o_map, wg, consumer / row_groups, thread, wg * 64 + warp % 4 * 16, {}, {},
             Softmax(params.scale_log2)}.run();
  }
};

extern "C" __global__ void __launch_bounds__(Config::threads, 1)
attention_forward_sm90(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                       const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap o, float* lse,
                       float scale_log2, int batch, int heads_q, u64 by_heads_q, u64 by_group_size, int seqlen_q,
                       int seqlen_k, int mask_left, int mask_right, int m_blocks, u64 by_m_blocks, int paired, int paired_rounds,
                       u64 by_single_heads SEQUENCE_PARAMETERS SCORE_PARAMETERS) {
  const AttentionParams<Config> params{lse, scale_log2, SCORE_VALUE, batch, heads_q, {by_heads_q}, {by_group_size},
                                       seqlen_q, {seqlen_k, mask_left, mask_right}, m_blocks, {by_m_blocks},
                                       paired, paired_rounds, {by_single_heads}, SEQUENCE_VALUE};
  extern __shared__ __align__(1024) u8 raw_smem[];
  using Kernel = ForwardKernel<Config>;
  auto& smem = *reinterpret_cast<typename Kernel::Smem*>(raw_smem);
  Kernel kernel{smem, params};
  // Uniform over the warp, which the compiler has to be told.
  const int warp = __shfl_sync(full_warp, threadIdx.x / 32, 0);

  if (threadIdx.x == 0) {
    prefetch_tensor_map(q);
    prefetch_tensor_map(k);
    prefetch_tensor_map(v);
    prefetch_tensor_map(o);
    for (int part = 0; part < Config::key_parts; ++part) smem.ring[part].init(Config::row_groups);
    for (int buffer = 0; buffer < Config::q_buffers; ++buffer)
      for (int wg = 0; wg < Config::row_groups; ++wg) {
        mbarrier_init(smem.q_full[buffer][wg], 1);
        mbarrier_init(smem.q_empty[buffer][wg], 1);
      }
    smem.tiles.init(Config::consumers * 128 + 2);
    fence_mbarrier_init();
  }
  __syncthreads();

  if (warp < 4) {
    if constexpr (Config::consumers > 1) setmaxnreg_dec<Config::producer_registers>();
    if (threadIdx.x == 0) kernel.load_kv(k, v, 0);
    if (threadIdx.x == 32) kernel.load_q(q);
    if (Config::key_parts > 1 && threadIdx.x == 64) kernel.load_kv(k, v, 1);
    if (Config::packed && threadIdx.x == 64) kernel.send_tiles();
    if (Config::packed && warp == 3) kernel.clear_gaps();
  } else {
    if constexpr (Config::consumers > 1) setmaxnreg_inc<Config::consumer_registers>();
    kernel.consume(o, warp / 4 - 1, threadIdx.x % 128, warp);
  }
}
