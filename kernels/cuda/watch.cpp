// The emulator's profiler and sanitizer. g++ -fsanitize=thread calls a function at each load and store of a kernel;
// here these functions are ours, and nothing else of that sanitizer is linked.
//
// Checked: an access outside of the arrays given and of shared memory; one at an address that is no multiple of its
// size; shared memory read before this block has written it; two threads at one place, one of them writing, with no
// barrier between.
// Counted: what the lanes of a warp do at one instruction is one request. To global memory it takes as many sectors of
// 32 bytes as it touches; to shared memory as many turns as its worst bank has different words.
//
// Lanes run one after the other here. The n-th time that each comes to an instruction after they met is one request:
// what a GPU does with lanes that go the same way, and an estimate for lanes that part.
#include "emulator.h"

#include <cstdio>
#include <dlfcn.h>
#include <link.h>
#include <unordered_map>
#include <vector>

#include "watch.h"

extern unsigned char shared_begin[] __asm__("__start_shared_memory") __attribute__((weak, visibility("hidden")));
extern unsigned char shared_end[] __asm__("__stop_shared_memory") __attribute__((weak, visibility("hidden")));

namespace emulator {

// ------------------------------------------------------------------ memory that a kernel may touch

// The last access to a place. Epochs count barriers, through all blocks; meetings those of a warp between two barriers.
struct Access {
    uint32_t epoch;
    uint32_t thread : 10, atomic : 1, meeting : 21;
};
enum Several : uint32_t { NO, IN_WARP, IN_BLOCK };
struct Cell { Access write, read; };  // for each byte

struct Memory {
    const unsigned char *begin, *end;
    const char* name;
    bool shared;
    std::vector<Cell> cells;
    std::vector<unsigned char> several;  // whether more than one thread read in that epoch: Several
};

struct Line {  // totals of one instruction
    void* pc;
    uint32_t shared, write, atomic;
    uint64_t requests, bytes, units, ideal;  // units: sectors, or turns of the banks; ideal: as few as these bytes need
};

struct Request { uintptr_t address[32]; uint32_t lanes; uint32_t bytes; };
struct Site {  // one instruction, and one memory: an asynchronous copy loads from one and stores to another
    void* pc;
    bool shared, write, atomic;
    uint32_t visits[32];
    std::vector<Request> requests;
};

static struct {
    std::vector<Memory> memory;
    const unsigned char *image_begin, *image_end;
    uint32_t epoch, first;  // now, and when this block began
    uint32_t meetings[32];
    std::unordered_map<uintptr_t, Site> sites[32];  // of each warp, since its lanes met
    uint32_t lanes_left[32];
    std::unordered_map<uintptr_t, Line> lines;
    std::vector<Line> report;
    uint64_t barriers, blocks, meetings_of_warps;
} watched;

static Memory* memory_of(const unsigned char* p) {
    for (Memory& m : watched.memory)
        if (p >= m.begin && p < m.end) return &m;
    return nullptr;
}

// ------------------------------------------------------------------ checks

// The launcher puts the line of `pc` in front, which addr2line knows.
static void complain(void* pc, const char* what, bool write, size_t bytes, const char* more) {
    fail({nullptr, 0}, "%p %s: %s of %zu bytes %s", pc, what, write ? "store" : "load", bytes, more);
}

static void out_of_bounds(void* pc, const unsigned char* p, size_t bytes, bool write) {
    const Memory* nearest = nullptr;
    long distance = 1 << 20;  // farther away it is nobody's
    for (const Memory& m : watched.memory) {
        const long d = p < m.begin ? m.begin - p : p - m.end;
        if (d < distance) nearest = &m, distance = d;
    }
    char more[200] = "at no memory that this kernel was given";
    if (nearest)
        snprintf(more, sizeof more, "%ld bytes %s %s, which has %zu bytes", distance,
                 p < nearest->begin ? "before the beginning of" : "past the end of", nearest->name,
                 (size_t)(nearest->end - nearest->begin));
    complain(pc, "out of bounds", write, bytes, more);
}

static bool ordered(const Access& before, unsigned me) {
    if (before.epoch != watched.epoch || before.thread == me) return true;
    return before.thread / 32 == me / 32 && before.meeting != (watched.meetings[me / 32] & 0x1fffff);
}

static void check(Memory& m, const unsigned char* p, size_t bytes, bool write, bool atomic, void* pc) {
    const unsigned me = thread.number;
    const Access mine = {watched.epoch, me, atomic, watched.meetings[me / 32] & 0x1fffff};
    const size_t first = p - m.begin;
    for (size_t i = first; i < first + bytes; i++) {
        Cell& c = m.cells[i];
        unsigned char& several = m.several[i];
        char more[200];
        if (m.shared && (!write || atomic) && c.write.epoch < watched.first) {
            snprintf(more, sizeof more, "from byte %zu of %s, which no thread of this block has written", i, m.name);
            complain(pc, "uninitialised", write, bytes, more);
        }
        const bool others_block = !m.shared && write && c.write.epoch && c.write.epoch < watched.first;
        if ((!ordered(c.write, me) || others_block) && !(atomic && c.write.atomic)) {
            snprintf(more, sizeof more, "%s byte %zu of %s, which thread %u%s has written with no barrier between",
                     write ? "to" : "from", i, m.name, c.write.thread, others_block ? " of another block" : "");
            complain(pc, "race", write, bytes, more);
        }
        if (write) {
            const bool met_since = c.read.thread / 32 == me / 32 && c.read.meeting != mine.meeting;
            const bool by_others = c.read.epoch == watched.epoch && (several == IN_BLOCK || !ordered(c.read, me) ||
                                                                     (several == IN_WARP && !met_since));
            if (by_others && !(atomic && c.read.atomic)) {
                snprintf(more, sizeof more, "to byte %zu of %s, which thread %u%s has read with no barrier between", i,
                         m.name, c.read.thread, several ? " and others" : "");
                complain(pc, "race", write, bytes, more);
            }
            c.write = mine;
        }
        if (!write || atomic) {
            if (c.read.epoch != watched.epoch || c.read.thread == me) {
                if (c.read.epoch != watched.epoch) several = NO;
            } else if (c.read.thread / 32 != me / 32) {
                several = IN_BLOCK;
            } else if (several != IN_BLOCK) {
                several = c.read.meeting == mine.meeting ? IN_WARP : NO;
            }
            c.read = mine;
        }
    }
}

// ------------------------------------------------------------------ requests of warps

static void count_global(Line& line, const Request& r) {
    std::vector<uintptr_t> sectors;
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(r.lanes >> lane & 1)) continue;
        line.bytes += r.bytes;
        for (uintptr_t s = r.address[lane] / 32; s <= (r.address[lane] + r.bytes - 1) / 32; s++)
            if (std::find(sectors.begin(), sectors.end(), s) == sectors.end()) sectors.push_back(s);
    }
    line.units += sectors.size();
    line.ideal += (__builtin_popcount(r.lanes) * r.bytes + 31) / 32;
}

static void count_shared(Line& line, const Request& r) {
    const unsigned together = r.bytes <= 4 ? 32 : r.bytes == 8 ? 16 : 8;  // lanes that the banks serve at once
    for (unsigned first = 0; first < 32; first += together) {
        std::vector<uintptr_t> words[32];
        unsigned most = 0;
        for (unsigned lane = first; lane < first + together; lane++) {
            if (!(r.lanes >> lane & 1)) continue;
            line.bytes += r.bytes;
            for (uintptr_t w = r.address[lane] / 4; w <= (r.address[lane] + r.bytes - 1) / 4; w++) {
                auto& bank = words[w % 32];
                if (std::find(bank.begin(), bank.end(), w) == bank.end()) bank.push_back(w);
                most = std::max(most, (unsigned)bank.size());
            }
        }
        line.units += most, line.ideal += most > 0;
    }
}

static void count_requests(unsigned warp) {
    for (auto& [key, site] : watched.sites[warp]) {
        if (site.requests.empty()) continue;
        Line& line = watched.lines[key];
        line.pc = site.pc, line.shared = site.shared, line.write = site.write, line.atomic = site.atomic;
        for (const Request& r : site.requests) {
            line.requests++;
            if (site.shared) count_shared(line, r);
            else count_global(line, r);
        }
        site.requests.clear();
        std::fill(site.visits, site.visits + 32, 0);
    }
}

static void access(const unsigned char* p, size_t bytes, bool write, bool atomic, void* pc) {
    const bool constant = p >= watched.image_begin && p < watched.image_end && !(p >= shared_begin && p < shared_end);
    if (on_a_stack(p) || constant) return;
    if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && (uintptr_t)p % bytes)
        complain(pc, "misaligned", write, bytes, "at an address that is no multiple of their number");
    Memory* m = memory_of(p);
    if (!m || p + bytes > m->end) return out_of_bounds(pc, p, bytes, write);
    check(*m, p, bytes, write, atomic, pc);
    if (m->shared && write) about_to_write(p), written(p, bytes);
    const unsigned warp = thread.number / 32, lane = thread.number % 32;
    Site& site = watched.sites[warp][(uintptr_t)pc * 4 + m->shared * 2 + write];
    site.pc = pc, site.shared = m->shared, site.write = write, site.atomic = atomic;
    const uint32_t visit = site.visits[lane]++;
    if (visit >= site.requests.size()) site.requests.push_back({{}, 0, (uint32_t)bytes});
    Request& r = site.requests[visit];
    r.address[lane] = (uintptr_t)p, r.lanes |= 1u << lane;
}

void watch(const void* p, size_t bytes, bool write, void* pc) {
    access(static_cast<const unsigned char*>(p), bytes, write, false, pc);
}
void watch_atomic(const void* p, size_t bytes, void* pc) {
    access(static_cast<const unsigned char*>(p), bytes, true, true, pc);
}

// ------------------------------------------------------------------ what the scheduler tells

void block_begins() {
    watched.first = ++watched.epoch;
    watched.blocks++;
    const unsigned threads = block_size.x * block_size.y * block_size.z;
    for (unsigned w = 0; w < 32; w++) {
        watched.meetings[w] = 0;
        watched.lanes_left[w] = w * 32 < threads ? std::min(32u, threads - w * 32) : 0;
    }
}
void block_met() {
    watched.epoch++, watched.barriers++;
    for (unsigned w = 0; w < 32; w++) count_requests(w);
}
void warp_met(unsigned warp, bool all) {
    watched.meetings_of_warps++;
    if (!all) return;  // the others may still be on their way to the same instruction
    watched.meetings[warp]++;
    count_requests(warp);
}
void returned(unsigned number) {
    if (--watched.lanes_left[number / 32] == 0) count_requests(number / 32);
}

}  // namespace emulator

// ------------------------------------------------------------------ what the launcher asks

#define PUBLIC extern "C" __attribute__((visibility("default")))
using namespace emulator;

static int find_image(dl_phdr_info* info, size_t, void* inside) {
    uintptr_t low = ~0ul, high = 0;
    for (int i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_LOAD) {
            low = std::min<uintptr_t>(low, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
            high = std::max<uintptr_t>(high, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
        }
    if ((uintptr_t)inside < low || (uintptr_t)inside >= high) return 0;
    watched.image_begin = (unsigned char*)low, watched.image_end = (unsigned char*)high;
    return 1;
}

// Before a launch: the arrays that it is given, and its dynamic shared memory. Counts begin anew.
PUBLIC void emulator_watch(int count, const unsigned char** begin, const size_t* bytes, const char** names,
                           const unsigned char* shared, size_t shared_bytes) {
    dl_iterate_phdr(find_image, (void*)&find_image);
    watched.memory.clear();
    auto add = [](const unsigned char* begin, size_t bytes, const char* name, bool shared) {
        if (!bytes) return;
        watched.memory.push_back({begin, begin + bytes, name, shared, {}, {}});
        watched.memory.back().cells.resize(bytes);
        watched.memory.back().several.resize(bytes);
    };
    for (int i = 0; i < count; i++) add(begin[i], bytes[i], names[i], false);
    add(shared, shared_bytes, "dynamic shared memory", true);
    add(shared_begin, shared_end - shared_begin, "shared memory", true);
    watched.epoch = watched.barriers = watched.blocks = watched.meetings_of_warps = 0;
    watched.lines.clear();
    for (auto& sites : watched.sites) sites.clear();
}

PUBLIC const Line* emulator_report(int* count, uint64_t* totals) {
    watched.report.clear();
    for (auto& [key, line] : watched.lines) watched.report.push_back(line);
    *count = watched.report.size();
    totals[0] = watched.blocks, totals[1] = watched.barriers, totals[2] = watched.meetings_of_warps;
    return watched.report.data();
}

PUBLIC const void* emulator_image() { return watched.image_begin; }

// ------------------------------------------------------------------ what g++ calls

#define CALLER __builtin_return_address(0)
#define HOOKS(n)                                                                                           \
    extern "C" void __tsan_read##n(void* p) { access((unsigned char*)p, n, false, false, CALLER); }         \
    extern "C" void __tsan_write##n(void* p) { access((unsigned char*)p, n, true, false, CALLER); }         \
    extern "C" void __tsan_unaligned_read##n(void* p) { access((unsigned char*)p, n, false, false, CALLER); } \
    extern "C" void __tsan_unaligned_write##n(void* p) { access((unsigned char*)p, n, true, false, CALLER); } \
    extern "C" void __tsan_volatile_read##n(void* p) { access((unsigned char*)p, n, false, false, CALLER); } \
    extern "C" void __tsan_volatile_write##n(void* p) { access((unsigned char*)p, n, true, false, CALLER); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
extern "C" void __tsan_read_range(void* p, size_t n) { access((unsigned char*)p, n, false, false, CALLER); }
extern "C" void __tsan_write_range(void* p, size_t n) { access((unsigned char*)p, n, true, false, CALLER); }
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit(void*) {}
extern "C" void __tsan_init() {}

// -fsanitize=bounds: an index past the end of an array whose size the compiler knows.
struct SourceLocation { const char* file; uint32_t line, column; };
extern "C" void __ubsan_handle_out_of_bounds(const SourceLocation* at, uintptr_t index) {
    fail({at->file, (int)at->line}, "out of bounds: index %ld of an array with fewer elements", (long)index);
}
