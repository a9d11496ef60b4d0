// Paged decode attention: over the rows that an answer's block table names, in the slab or in the extents, and over local runs.

// The front of a block table, [member][KV head] of these, and the runs behind it: as kvoyant_protocol::wire has them.
struct HeadEntry {
    u32 first_run, runs, rows, resident;
};
struct BlockRun {
    u32 row, token, rows_and_space;
};
static const u32 IN_SLAB = 1u << 31;

struct AttendParams {
    u64 queries;        // f32 [members][kv_heads * group][d]
    u64 out;            // f32, as queries; of all splits one behind the other when there are several
    u64 lse;            // f32 [members][kv_heads * group]; of all splits likewise
    u64 table;          // HeadEntry [members][kv_heads], then BlockRun [table_runs]; 0: local runs only
    u64 slab;           // row 0 of the slab
    u64 extents;        // u64 [extent_count]: where each extent begins
    u64 local_runs;     // RowRun
    u64 local_offsets;  // u32 [members * kv_heads + 1]: first local run of each head; 0: none
    u64 status;         // u64: the answer's status word; 0: not looked at
    u64 expected;       // what it must be for the table to be read
    u64 failed;         // u32, or 0: gets FAILED_ bits, is never cleared
    u32 dtype, d, group, kv_heads, members;
    u32 row_bytes, slab_rows, rows_per_extent, extent_count, table_runs;
    u32 tile_rows, splits;
    float scale;
    u32 pad;
};
static_assert(sizeof(HeadEntry) == 16 && sizeof(BlockRun) == 12 && sizeof(AttendParams) == 144, "mirrored in params.rs");

// A run of the table as an address; without rows when it leads outside the slab or the extents.
KV_DEVICE RowRun locate_run(const AttendParams& p, const BlockRun& run) {
    RowRun located = {0, run.rows_and_space & ~IN_SLAB, 0};
    u64 end = (u64)run.row + located.rows;
    if (located.rows == 0) {
        return located;
    }
    if (run.rows_and_space & IN_SLAB) {
        if (end <= p.slab_rows) {
            located.address = p.slab + (u64)run.row * p.row_bytes;
            return located;
        }
    } else if (p.rows_per_extent > 0) {
        u32 extent = run.row / p.rows_per_extent;
        if (extent < p.extent_count && end <= (u64)(extent + 1) * p.rows_per_extent) {
            u64 base = at<const u64>(p.extents)[extent];
            if (base != 0) {
                located.address = base + (u64)(run.row % p.rows_per_extent) * p.row_bytes;
                return located;
            }
        }
    }
    fail(p.failed, FAILED_RANGE);
    located.rows = 0;
    return located;
}

// Whether the block table may be read. One thread looks, so that all of a block agree.
KV_DEVICE bool table_is_valid(const AttendParams& p, const RowTile& tile) {
    if (threadIdx.x == 0) {
        bool stale = p.status != 0 && load_acquire(p.status) != p.expected;
        if (stale) {
            fail(p.failed, FAILED_STATUS);
        }
        tile.sums[0] = p.table != 0 && !stale;
    }
    __syncthreads();
    bool valid = tile.sums[0] != 0;
    __syncthreads();
    return valid;
}

template <u32 DTYPE, u32 G>
KV_DEVICE void attend_head(const AttendParams& p, u32 head, u32 chunk, u32 heads) {
    KV_DYNAMIC_SHARED(shared);
    RowTile tile;
    Softmax<G> state;
    u8* free = carve_tile(tile, shared, p.tile_rows, p.row_bytes);
    u64 first = (u64)head * p.group + chunk * GROUP_MAX;
    begin_softmax<G>(state, free, tile, p.queries + first * p.d * 4, heads, p.d);
    Share share = {0, blockIdx.z, p.splits};
    u32 local = 0, local_runs = 0;
    if (p.local_offsets != 0) {
        local = at<const u32>(p.local_offsets)[head];
        local_runs = at<const u32>(p.local_offsets)[head + 1] - local;
    }
    HeadEntry entry = {0, 0, 0, 0};
    u64 table_runs = p.table + (u64)p.members * p.kv_heads * sizeof(HeadEntry);
    if (table_is_valid(p, tile)) {
        entry = at<const HeadEntry>(p.table)[head];
        if ((u64)entry.first_run + entry.runs > p.table_runs) {
            fail(p.failed, FAILED_RANGE);
            entry.runs = 0;
        }
    }
    u32 runs = local_runs + entry.runs;
    KV_LOOP
    for (u32 first_run = 0; first_run < runs; first_run += THREADS) {
        u32 i = first_run + threadIdx.x;
        RowRun run = {0, 0, 0};
        if (i < local_runs) {
            run = at<const RowRun>(p.local_runs)[local + i];
        } else if (i < runs) {
            run = locate_run(p, at<const BlockRun>(table_runs)[entry.first_run + i - local_runs]);
        }
        attend_placed<DTYPE, G>(state, tile, share, run, p.row_bytes, p.d, p.scale);
    }
    u64 heads_all = (u64)p.members * p.kv_heads * p.group;
    u64 place = blockIdx.z * heads_all + first;
    end_softmax<G>(state, p.out + place * p.d * 4, p.lse + place * 4, heads, p.d);
}

// A block for each (member, KV head, up to GROUP_MAX of its query heads) in grid.x and each split in grid.z.
extern "C" __global__ void attend(const AttendParams p) {
    u32 chunks = (p.group + GROUP_MAX - 1) / GROUP_MAX;
    u32 head = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
    u32 heads = smaller(p.group - chunk * GROUP_MAX, GROUP_MAX);
    KV_FOR_SHAPE(attend_head, p.dtype, heads, p, head, chunk, heads);
}
