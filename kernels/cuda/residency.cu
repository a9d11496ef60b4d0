// Graph mode: attention over rows that were selected on the device, wherever they lie, and the report of what was selected. Every
// address is fixed when a graph is captured; what changes from replay to replay is read from memory.

// What one KV head of a layer keeps in the slab: `count` entries follow, by ascending token.
struct ResidencyHeader {
    u64 version;
    u32 count, pad;
};
struct ResidencyEntry {
    u32 token, slot;
};

// Where a sequence stands.
struct Position {
    u32 sinks;         // tokens 0 .. sinks are the engine's own
    u32 first_window;  // tokens first_window .. tokens are, too
    u32 tokens;
    u32 pad;
};

struct ResolveParams {
    u64 queries;     // f32 [kv_heads * group][d]
    u64 out;         // f32 [splits][kv_heads * group][d]
    u64 lse;         // f32 [splits][kv_heads * group]
    u64 ids;         // u32 [kv_heads][ids_stride]: selected tokens
    u64 counts;      // u32 [kv_heads]
    u64 misses;      // u32 [kv_heads]: gets how many ids were not in the slab; or 0
    u64 position;    // Position
    u64 residency;   // [kv_heads] records, `residency_stride` bytes apart; 0: nothing is resident
    u64 expected;    // u64: the version with which a record holds
    u64 slab;        // row 0 of the slab
    u64 pages;       // u32 [kv_heads][page_capacity]: page of each block of `page_rows` tokens; NO_PAGE: none
    u64 extents;     // u64 [extent_count]
    u64 sinks;       // rows of tokens 0 .., of each KV head `sinks_stride` bytes apart
    u64 window;      // ring of `window_rows` rows, token t at t % window_rows, of each KV head `window_stride` bytes apart
    u64 failed;      // u32, or 0: gets FAILED_ bits, is never cleared
    u64 residency_stride, sinks_stride, window_stride;
    u32 dtype, d, group, kv_heads, row_bytes;
    u32 ids_stride, residency_capacity, slab_rows;
    u32 page_capacity, page_rows, pages_per_extent, extent_count;
    u32 window_rows, tile_rows, splits;
    float scale;
};
static_assert(sizeof(ResolveParams) == 208, "mirrored in params.rs");

static const u32 NO_PAGE = 0xffffffffu;

// Row of a token in the slab, or NO_PAGE. Entries are ascending.
KV_DEVICE u32 find_slot(const ResidencyEntry* entries, u32 count, u32 token) {
    u32 low = 0, high = count;
    while (low < high) {
        u32 middle = low + (high - low) / 2;
        if (entries[middle].token < token) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < count && entries[low].token == token ? entries[low].slot : NO_PAGE;
}

// A token's row in the session's own extents; without rows when there is none.
KV_DEVICE RowRun find_page(const ResolveParams& p, u32 head, u32 token) {
    RowRun row = {0, 0, 0};
    u32 block = token / p.page_rows;
    if (block < p.page_capacity) {
        u32 page = at<const u32>(p.pages)[(u64)head * p.page_capacity + block];
        u32 extent = page / p.pages_per_extent;
        u64 base = page != NO_PAGE && extent < p.extent_count ? at<const u64>(p.extents)[extent] : 0;
        if (base != 0) {
            u64 in_extent = (u64)(page % p.pages_per_extent) * p.page_rows + token % p.page_rows;
            row.address = base + in_extent * p.row_bytes;
            row.rows = 1;
            return row;
        }
    }
    fail(p.failed, FAILED_RANGE);
    return row;
}

// The engine's own rows: the sinks, then the window's older and newer part.
KV_DEVICE RowRun local_run(const ResolveParams& p, const Position& position, u32 head, u32 part) {
    RowRun run = {0, 0, 0};
    if (part == 0) {
        run.address = p.sinks + head * p.sinks_stride;
        run.rows = smaller(position.sinks, position.tokens);
        return run;
    }
    if (p.window_rows == 0 || position.first_window >= position.tokens) {
        return run;
    }
    u32 rows = position.tokens - position.first_window;
    if (rows > p.window_rows) {
        fail(p.failed, FAILED_RANGE);
        rows = p.window_rows;
    }
    u32 begin = (position.tokens - rows) % p.window_rows;
    u32 older = smaller(rows, p.window_rows - begin);
    u64 window = p.window + head * p.window_stride;
    run.address = part == 1 ? window + (u64)begin * p.row_bytes : window;
    run.rows = part == 1 ? older : rows - older;
    return run;
}

template <u32 DTYPE, u32 G>
KV_DEVICE void resolve_head(const ResolveParams& p, u32 head, u32 chunk, u32 heads) {
    const u32 LOCAL_RUNS = 3;
    KV_DYNAMIC_SHARED(shared);
    RowTile tile;
    Softmax<G> state;
    u8* free = carve_tile(tile, shared, p.tile_rows, p.row_bytes);
    u64 first = (u64)head * p.group + chunk * GROUP_MAX;
    begin_softmax<G>(state, free, tile, p.queries + first * p.d * 4, heads, p.d);
    Share share = {0, blockIdx.z, p.splits};
    Position position = *at<const Position>(p.position);
    const ResidencyEntry* entries = at<const ResidencyEntry>(0);
    // One thread looks, so that all of the block agree.
    if (threadIdx.x == 0) {
        u32 resident = 0;
        if (p.residency != 0) {
            const ResidencyHeader* record = at<const ResidencyHeader>(p.residency + head * p.residency_stride);
            bool holds = load_acquire((u64)&record->version) == load_acquire(p.expected);
            resident = holds ? smaller(record->count, p.residency_capacity) : 0;
        }
        tile.sums[0] = resident;
    }
    __syncthreads();
    u32 resident = tile.sums[0];
    __syncthreads();
    if (resident > 0) {
        entries = at<const ResidencyEntry>(p.residency + head * p.residency_stride + sizeof(ResidencyHeader));
    }
    u32 count = smaller(at<const u32>(p.counts)[head], p.ids_stride);
    u32 missed = 0;
    KV_LOOP
    for (u32 first_run = 0; first_run < LOCAL_RUNS + count; first_run += THREADS) {
        u32 i = first_run + threadIdx.x;
        RowRun run = {0, 0, 0};
        if (i < LOCAL_RUNS) {
            run = local_run(p, position, head, i);
        } else if (i < LOCAL_RUNS + count) {
            u32 token = at<const u32>(p.ids)[(u64)head * p.ids_stride + i - LOCAL_RUNS];
            // What is the engine's own is attended already.
            if (token >= position.sinks && token < smaller(position.first_window, position.tokens)) {
                u32 slot = find_slot(entries, resident, token);
                if (slot < p.slab_rows) {
                    run.address = p.slab + (u64)slot * p.row_bytes;
                    run.rows = 1;
                } else {
                    missed++;
                    run = find_page(p, head, token);
                }
            }
        }
        attend_placed<DTYPE, G>(state, tile, share, run, p.row_bytes, p.d, p.scale);
    }
    if (p.misses != 0 && chunk == 0 && blockIdx.z == 0) {
        missed = warp_sum(missed);
        if (threadIdx.x % WARP == 0) {
            tile.sums[threadIdx.x / WARP] = missed;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            u32 sum = 0;
            for (u32 i = 0; i < WARPS; i++) {
                sum += tile.sums[i];
            }
            at<u32>(p.misses)[head] = sum;
        }
    }
    u64 place = (u64)blockIdx.z * p.kv_heads * p.group + first;
    end_softmax<G>(state, p.out + place * p.d * 4, p.lse + place * 4, heads, p.d);
}

// A block for each (KV head, up to GROUP_MAX of its query heads) in grid.x and each split in grid.z.
extern "C" __global__ void resolve_attend(const ResolveParams p) {
    u32 chunks = (p.group + GROUP_MAX - 1) / GROUP_MAX;
    u32 head = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
    u32 heads = smaller(p.group - chunk * GROUP_MAX, GROUP_MAX);
    KV_FOR_SHAPE(resolve_head, p.dtype, heads, p, head, chunk, heads);
}

// The front of a report; u32 counts [heads], u32 misses [heads] and u32 ids [heads][capacity] follow.
struct ReportHeader {
    u64 number;  // 0 while it is being written
    u64 sequence;
    u32 layer, heads, capacity, tokens;
};

struct ReportParams {
    u64 ids;       // u32 [heads][capacity]
    u64 counts;    // u32 [heads]
    u64 misses;    // u32 [heads], or 0: none
    u64 position;  // Position
    u64 counter;   // u64: number of the last report
    u64 mailbox;   // ring of `slots` reports, `slot_bytes` apart: report r in slot r % slots
    u64 sequence;
    u32 slots, slot_bytes;
    u32 layer, heads, capacity, pad;
};
static_assert(sizeof(ResidencyHeader) == 16 && sizeof(ResidencyEntry) == 8, "mirrored in params.rs");
static_assert(sizeof(Position) == 16 && sizeof(ReportHeader) == 32, "mirrored in params.rs");
static_assert(sizeof(ReportParams) == 80, "mirrored in params.rs");

// One block, so that one thread can say when all is written.
extern "C" __global__ void report(const ReportParams p) {
    u64 number = *at<const u64>(p.counter) + 1;
    u64 slot = p.mailbox + number % p.slots * p.slot_bytes;
    ReportHeader* header = at<ReportHeader>(slot);
    // A reader that is in the middle of the slot's last report finds out.
    if (threadIdx.x == 0) {
        store_release((u64)&header->number, 0);
        __threadfence_system();
        header->sequence = p.sequence;
        header->layer = p.layer;
        header->heads = p.heads;
        header->capacity = p.capacity;
        header->tokens = at<const Position>(p.position)->tokens;
    }
    __syncthreads();
    u32* counts = at<u32>(slot + sizeof(ReportHeader));
    u32* misses = counts + p.heads;
    u32* ids = misses + p.heads;
    for (u32 i = threadIdx.x; i < p.heads; i += THREADS) {
        counts[i] = smaller(at<const u32>(p.counts)[i], p.capacity);
        misses[i] = p.misses == 0 ? 0 : at<const u32>(p.misses)[i];
    }
    for (u32 head = 0; head < p.heads; head++) {
        u32 count = smaller(at<const u32>(p.counts)[head], p.capacity);
        for (u32 i = threadIdx.x; i < count; i += THREADS) {
            ids[(u64)head * p.capacity + i] = at<const u32>(p.ids)[(u64)head * p.capacity + i];
        }
    }
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) {
        *at<u64>(p.counter) = number;
        store_release((u64)&header->number, number);
    }
}
