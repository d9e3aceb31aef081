// The products of warpgroups (wgmma.cuh), as the emulator does them: asynchronous, and strict about it.
//
// A product is computed when it is waited for, from what shared memory holds then; until then its sums are NaN. What
// GPUs leave undefined is an error here: sums touched in between, shared memory written while a product may read it, or
// read without the writer's proxy fence.
//
// Descriptors are read as the PTX manual defines them (9.7.15.5.1, "canonical layouts", in its figures and as strides),
// for all four swizzles: nothing here knows how a kernel writes its tiles.
//
// Counted are the bytes of both matrices, once for an instruction, as 8 rows of 16 bytes at a time: what a GPU takes
// for that is not documented, and turns of banks are those which the same threads would need.
#include "emulator.h"

#include <vector>

namespace emulator {

constexpr unsigned WARPGROUP = 128, DEPTH = 16;
constexpr unsigned FIRST = 16;         // the address of dynamic shared memory: as after an array of the kernel's
constexpr unsigned WINDOW = 1 << 18;   // bytes that a descriptor reaches
constexpr uint32_t IN_FLIGHT = 0x7f80dead;  // a signalling NaN: whatever is computed of it has other bits

struct Sums { float* registers; std::vector<float> values; unsigned products; };
struct Product {
    float* sum;
    unsigned columns;
    uint64_t a, b;
    float (*number_at)(const void*);  // of the type that is multiplied
    unsigned group;
    Place at;
};
struct Worker {  // a thread
    std::vector<Sums> sums;
    std::vector<Product> products;
    std::vector<unsigned> written;  // pieces of shared memory, since its last proxy fence
    unsigned group;
    bool fenced;
    uint64_t issued;  // all descriptors, in one number: those of a warpgroup's threads are the same
};
struct Piece { uint16_t writer, reader, readers; };  // 16 bytes: who wrote it without a fence (+ 1), and who reads it

static struct {
    std::vector<Worker> workers = std::vector<Worker>(1024);
    std::vector<Piece> pieces;
} flying;

// ------------------------------------------------------------------ addresses

unsigned shared_address(const void* p) {
    const size_t place = static_cast<const unsigned char*>(p) - dynamic_shared;
    if (place >= shared_bytes) fail({nullptr, 0}, "an address in shared memory is asked of memory that is not dynamic");
    return FIRST + place;
}

// Where number (mn, k) of a matrix lies: mn is its row in A, its column in B. W pieces of 16 bytes make a row.
static unsigned place_of(uint64_t descriptor, bool k_major, unsigned mn, unsigned k) {
    const unsigned begin = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
    const unsigned stride = (descriptor >> 32 & 0x3fff) << 4, mode = descriptor >> 62;
    const unsigned w = mode == 0 ? 1 : mode == 1 ? 8 : mode == 2 ? 4 : 2;
    unsigned place = begin;
    if (k_major) {
        place += mn % 8 * 16 * w + mn / 8 * stride;
        place += k % 8 * 2 + k / 8 * (w == 1 ? leading : 16);
    } else {
        place += mn % 8 * 2 + mn / 8 % w * 16 + mn / (8 * w) * (w == 1 ? stride : leading);
        place += k % 8 * 16 * w + k / 8 * (w == 1 ? leading : stride);
    }
    place ^= (place >> 7 & (w - 1)) << 4;  // the swizzle: of the address, and not of the place in the tile
    return place % WINDOW;
}

static const unsigned char* at_address(unsigned address, Place at) {
    if (address < FIRST || address - FIRST >= shared_bytes)
        fail(at, "out of bounds: wgmma reads address %u, and dynamic shared memory is %u to %zu", address, FIRST,
             FIRST + shared_bytes);
    return dynamic_shared + (address - FIRST);
}

// ------------------------------------------------------------------ what shared memory is used for

void written(const void* p, size_t bytes) {
    const size_t first = static_cast<const unsigned char*>(p) - dynamic_shared;
    if (first >= shared_bytes) return;
    for (size_t i = first / 16; i <= (first + bytes - 1) / 16 && i < flying.pieces.size(); i++) {
        Piece& piece = flying.pieces[i];
        if (piece.writer == thread.number + 1) continue;
        piece.writer = thread.number + 1;
        flying.workers[thread.number].written.push_back(i);
    }
}

void about_to_write(const void* p) {
    const size_t place = static_cast<const unsigned char*>(p) - dynamic_shared;
    if (place >= shared_bytes || !flying.pieces[place / 16].readers) return;
    const auto& reads = flying.workers[flying.pieces[place / 16].reader].products;
    const Place at = reads.empty() ? Place{nullptr, 0} : reads[0].at;  // the last reader may be done, and another not
    fail(at, "race: byte %zu of dynamic shared memory is written while this wgmma may read it",
         place);
}

void fence_proxy() {
    Worker& me = flying.workers[thread.number];
    for (unsigned i : me.written)
        if (flying.pieces[i].writer == thread.number + 1) flying.pieces[i].writer = 0;
    me.written.clear();
}

// The pieces of a product that this thread of its warpgroup answers for: 1 of A, 1 of B for 64 columns. 8 threads have
// a core matrix, 8 rows of 16 bytes, which tensor cores take at once.
template <class F> static void each_piece(const Product& p, F f) {
    const unsigned number = thread.number % WARPGROUP;
    f(place_of(p.a, true, number % 64, number / 64 * 8));
    for (unsigned i = number; i < DEPTH * p.columns / 8; i += WARPGROUP)
        f(place_of(p.b, false, i / DEPTH * 8, i % DEPTH));
}

// ------------------------------------------------------------------ products

void fence_sums() { flying.workers[thread.number].fenced = true; }
void commit_products() { flying.workers[thread.number].group++; }

void multiply_later(float* sum, unsigned columns, uint64_t a, uint64_t b, float (*number_at)(const void*), Place at,
                    void* pc) {
    Worker& me = flying.workers[thread.number];
    const Product p = {sum, columns, a, b, number_at, me.group, at};
    if (block_size.x * block_size.y * block_size.z % WARPGROUP) fail(at, "wgmma in a block of no whole warpgroups");
    if ((a >> 49 | b >> 49) & 7) fail(at, "wgmma with a matrix base offset, which the emulator does not know");
    auto known = std::find_if(me.sums.begin(), me.sums.end(), [sum](const Sums& s) { return s.registers == sum; });
    if (known == me.sums.end()) {
        if (!me.fenced) fail(at, "wgmma without wgmma_fence() since its sums were registers of the thread");
        me.sums.push_back({sum, std::vector<float>(sum, sum + columns / 2), 0});
        known = me.sums.end() - 1;
        for (unsigned i = 0; i < columns / 2; i++) memcpy(sum + i, &IN_FLIGHT, 4);
    }
    known->products++;
    each_piece(p, [&](unsigned address) {
        const unsigned char* from = at_address(address, at);
        watch(from, 16, false, pc);
        Piece& piece = flying.pieces[(from - dynamic_shared) / 16];
        if (piece.writer)
            fail(at, "race: wgmma reads byte %zu of dynamic shared memory, which thread %u has written with no "
                 "fence_proxy_async() since", (size_t)(from - dynamic_shared), piece.writer - 1u);
        piece.readers++, piece.reader = thread.number;
    });
    me.products.push_back(p);
    me.issued = (me.issued + a) * 31 + b;
}

static float number_of_a(const Product& p, unsigned row, unsigned k) {
    return p.number_at(at_address(place_of(p.a, true, row, k), p.at));
}
static float number_of_b(const Product& p, unsigned k, unsigned column) {
    return p.number_at(at_address(place_of(p.b, false, column, k), p.at));
}

static void compute(const Product& p, std::vector<float>& sum) {
    const unsigned row = thread.number % WARPGROUP / 32 * 16 + lane() / 4;
    float of_a[2][DEPTH], of_b[DEPTH];
    for (unsigned k = 0; k < DEPTH; k++)
        for (unsigned h = 0; h < 2; h++) of_a[h][k] = number_of_a(p, row + h * 8, k);
    for (unsigned i = 0; i < p.columns / 4; i++) {  // two columns of each eight
        for (unsigned k = 0; k < DEPTH; k++) of_b[k] = number_of_b(p, k, i / 2 * 8 + lane() % 4 * 2 + i % 2);
        for (unsigned h = 0; h < 2; h++) {
            float product = 0;
            for (unsigned k = 0; k < DEPTH; k++) product += of_a[h][k] * of_b[k];
            sum[i / 2 * 4 + h * 2 + i % 2] += product;
        }
    }
}

void finish_products(unsigned keep, Place at) {
    Worker& me = flying.workers[thread.number];
    size_t done = 0;
    for (const Product& p : me.products) {
        if (p.group + keep >= me.group) break;
        Sums& sums = *std::find_if(me.sums.begin(), me.sums.end(), [&p](Sums& s) { return s.registers == p.sum; });
        compute(p, sums.values);
        each_piece(p, [&](unsigned address) { flying.pieces[(address - FIRST) / 16].readers--; });
        sums.products--, done++;
    }
    me.products.erase(me.products.begin(), me.products.begin() + done);
    for (size_t i = 0; i < me.sums.size();) {
        Sums& sums = me.sums[i];
        if (sums.products) { i++; continue; }
        for (size_t j = 0; j < sums.values.size(); j++) {
            if (memcmp(sums.registers + j, &IN_FLIGHT, 4))
                fail(at, "a sum of wgmma was written to before it was waited for");
            sums.registers[j] = sums.values[j];
        }
        me.sums.erase(me.sums.begin() + i);
        me.fenced = false;
    }
}

// ------------------------------------------------------------------ what the scheduler tells

void products_begin(unsigned threads) {
    flying.pieces.assign((shared_bytes + 15) / 16, {});
    for (unsigned i = 0; i < threads; i++) {
        Worker& w = flying.workers[i];
        w.sums.clear(), w.products.clear(), w.written.clear();
        w.group = 0, w.fenced = false, w.issued = 0;
    }
}

void products_end() {
    const unsigned first = thread.number / WARPGROUP * WARPGROUP;
    const Worker &me = flying.workers[thread.number], &leader = flying.workers[first];
    if (!me.products.empty()) fail(me.products[0].at, "the thread ends, and has not waited for this wgmma");
    if (me.issued != leader.issued)
        fail({nullptr, 0}, "threads %u and %u are of one warpgroup, and have issued different wgmmas", first,
             thread.number);
}

}  // namespace emulator
