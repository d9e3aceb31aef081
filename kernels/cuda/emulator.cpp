// The emulator's scheduler: one block at a time, its threads as fibers, and the places where they wait for each other.
//
// A fiber runs until it must wait; then the next one runs. Nobody can be surprised in the middle of anything, so
// atomics are plain code, and every run of a kernel is the same run. If all that are left wait, nobody will ever come:
// that is a barrier that not all threads reach, and an error that says who waits where.
#include "emulator.h"

#include <cstdarg>
#include <cstdio>
#include <string>
#include <sys/mman.h>
#include <vector>

#include "watch.h"

namespace emulator {

Thread thread;
uint3 block_index;
dim3 block_size, grid_size;
unsigned char* dynamic_shared;
size_t shared_bytes;

// ------------------------------------------------------------------ fibers

// Leave the running stack, saving where it stands, and enter another one.
extern "C" void emulator_switch(void** leave, void* enter);
#if defined(__x86_64__)
asm(".text\n.globl emulator_switch\n.hidden emulator_switch\n.type emulator_switch,@function\nemulator_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
constexpr int SAVED = 7, RETURN = 6;  // words on a stack that is not running, and which is the address to go on at
#else
asm(".text\n.globl emulator_switch\n.hidden emulator_switch\n.type emulator_switch,%function\nemulator_switch:\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n");
constexpr int SAVED = 20, RETURN = 11;
#endif

constexpr size_t STACK = 64 << 10;  // bytes for a thread's local variables and calls
constexpr unsigned MOST_THREADS = 1024;

struct Meeting;  // of the lanes of a warp
struct Copy { void* to; const void* from; size_t bytes; unsigned group; void* pc; };

struct Fiber {
    Thread thread;
    void* stack_pointer;
    enum { READY, WAITING, RETURNED } state;
    Place at;          // where it waits
    const char* what;  // and for what
    Meeting* last;     // the one whose results it may still be reading
    unsigned group;    // of asynchronous copies
    std::vector<Copy> copies;
};

struct Meeting {
    unsigned warp, mask, arrived, readers;
    Place at;
    const char* what;
    alignas(16) unsigned char brought[32 * WIDEST];
};

static struct {
    std::vector<Fiber> fibers = std::vector<Fiber>(MOST_THREADS);
    unsigned threads, waiting, returned;
    std::vector<Meeting*> open, unused;
    int votes[2];
    unsigned barriers;
    unsigned char* stacks;
    void* scheduler;  // its stack pointer while a fiber runs
    Fiber* running;
    void (*body)(void**);
    void** arguments;
    std::string error;
} now;

static void leave() { emulator_switch(&now.running->stack_pointer, now.scheduler); }

void fail(Place at, const char* format, ...) {
    char words[1000];
    va_list list;
    va_start(list, format);
    vsnprintf(words, sizeof words, format, list);
    va_end(list);
    const uint3 &t = thread.index, &b = block_index;
    char where[300];
    snprintf(where, sizeof where, " [thread (%u, %u, %u) of block (%u, %u, %u)]", t.x, t.y, t.z, b.x, b.y, b.z);
    now.error = (at.file ? std::string(at.file) + ":" + std::to_string(at.line) + ": " : std::string()) + words + where;
    leave();  // and nobody comes back
}

static void wait(Place at, const char* what) {
    Fiber* me = now.running;
    me->state = Fiber::WAITING, me->at = at, me->what = what;
    leave();
}

static void done_reading(Fiber* f) {
    if (f->last && --f->last->readers == 0) now.unused.push_back(f->last);
    f->last = nullptr;
}

static void thread_main() {
    now.body(now.arguments);
    Fiber* me = now.running;
    done_reading(me);
    commit_copies();
    finish_copies(0);
    products_end();
    me->state = Fiber::RETURNED;
    now.returned++;
    if (now.waiting) {
        Fiber* other = std::find_if(now.fibers.data(), now.fibers.data() + now.threads, [](const Fiber& f) {
            return f.state == Fiber::WAITING && !strncmp(f.what, "__syncthreads", 13);
        });
        fail(other->at, "divergent barrier: %u threads wait in %s, which this one has passed by", now.waiting,
             other->what);
    }
    returned(me->thread.number);
    leave();
}

static void* new_stack(unsigned number) {
    auto top = reinterpret_cast<void**>(now.stacks + (number + 1) * STACK) - SAVED - 1;  // as after a call: 8 past 16
#if defined(__aarch64__)
    top -= 1;  // a multiple of 16
#endif
    std::fill(top, top + SAVED, nullptr);
    top[RETURN] = reinterpret_cast<void*>(thread_main);
    return top;
}

// ------------------------------------------------------------------ waiting for the block

static bool same(Place a, Place b) { return a.line == b.line && !strcmp(a.file, b.file); }

static void meet_block(Place at, const char* what) {
    Fiber* me = now.running;
    done_reading(me);
    if (now.returned)
        fail(at, "divergent barrier: %u of the %u threads of the block have returned before", now.returned,
             now.threads);
    for (unsigned i = 0; now.waiting && i < now.threads; i++) {
        const Fiber& f = now.fibers[i];
        if (f.state == Fiber::WAITING && !strncmp(f.what, "__syncthreads", 13)) {
            if (!same(f.at, at))
                fail(at, "divergent barrier: thread %u waits in another one, at %s:%d", i, f.at.file, f.at.line);
            break;  // all that wait have been compared with one of them
        }
    }
    if (++now.waiting < now.threads) return wait(at, what);
    now.waiting = 0;
    for (unsigned i = 0; i < now.threads; i++) now.fibers[i].state = Fiber::READY;
    now.votes[++now.barriers % 2] = 0;
    block_met();
    leave();  // so that they go on in the order of their numbers
}

void wait_for_block(Place at) { meet_block(at, "__syncthreads"); }

int count_in_block(bool vote, Place at) {
    const int which = now.barriers % 2;
    now.votes[which] += vote;
    meet_block(at, "__syncthreads_count");
    return now.votes[which];
}

// ------------------------------------------------------------------ waiting for the warp

static unsigned lanes_of(unsigned warp) {
    const unsigned count = now.threads - warp * 32;
    return count < 32 ? (1u << count) - 1 : ~0u;
}

const unsigned char* wait_for_warp(unsigned mask, const void* mine, size_t bytes, const char* what, Place at) {
    Fiber* me = now.running;
    done_reading(me);
    const unsigned warp = me->thread.number / 32, lane = me->thread.number % 32, all = lanes_of(warp);
    if (!(mask >> lane & 1)) fail(at, "%s with mask %#x, in which its own lane %u is missing", what, mask, lane);
    mask &= all;
    for (unsigned i = 0; i < 32; i++)
        if (mask >> i & 1 && now.fibers[warp * 32 + i].state == Fiber::RETURNED)
            fail(at, "%s with mask %#x waits for lane %u, which has returned", what, mask, i);
    Meeting* meeting = nullptr;
    for (Meeting* m : now.open)
        if (m->warp == warp && m->mask == mask && m->what == what && same(m->at, at)) meeting = m;
    if (!meeting) {
        if (now.unused.empty()) now.unused.push_back(new Meeting);
        meeting = now.unused.back();
        now.unused.pop_back();
        meeting->warp = warp, meeting->mask = mask, meeting->arrived = 0, meeting->what = what, meeting->at = at;
        now.open.push_back(meeting);
    }
    memcpy(meeting->brought + lane * WIDEST, mine, bytes);
    meeting->arrived |= 1u << lane;
    me->last = meeting;
    if (meeting->arrived != mask) {
        wait(at, what);
    } else {
        meeting->readers = __builtin_popcount(mask);
        now.open.erase(std::find(now.open.begin(), now.open.end(), meeting));
        for (unsigned i = 0; i < 32; i++)
            if (mask >> i & 1) now.fibers[warp * 32 + i].state = Fiber::READY;
        warp_met(warp, mask == all);
    }
    return meeting->brought;
}

// ------------------------------------------------------------------ asynchronous copies

// They are made when they are waited for, and not before: who reads too early finds what was there.
void copy_later(void* to, const void* from, size_t bytes, void* pc) {
    about_to_write(to);
    now.running->copies.push_back({to, from, bytes, now.running->group, pc});
}

void commit_copies() { now.running->group++; }

void finish_copies(unsigned keep) {
    Fiber* me = now.running;
    size_t done = 0;
    for (const Copy& c : me->copies) {
        if (c.group + keep >= me->group) break;
        if (c.from) watch(c.from, c.bytes, false, c.pc);
        watch(c.to, c.bytes, true, c.pc);
        c.from ? memcpy(c.to, c.from, c.bytes) : memset(c.to, 0, c.bytes);
        written(c.to, c.bytes);
        done++;
    }
    me->copies.erase(me->copies.begin(), me->copies.begin() + done);
}

// ------------------------------------------------------------------ blocks

static void stuck() {
    std::string words = "no thread can go on:";
    for (unsigned i = 0; i < now.threads;) {
        const Fiber& f = now.fibers[i];
        unsigned end = i + 1;
        auto alike = [&f](const Fiber& g) {
            return g.state == f.state && (f.state == Fiber::RETURNED || same(f.at, g.at));
        };
        while (end < now.threads && alike(now.fibers[end])) end++;
        words += "\n  threads " + std::to_string(i) + " to " + std::to_string(end - 1);
        if (f.state == Fiber::RETURNED) words += " have returned";
        else words += std::string(" wait in ") + f.what + " at " + f.at.file + ":" + std::to_string(f.at.line);
        i = end;
    }
    now.error = words;
}

static void run_block() {
    for (unsigned i = 0; i < now.threads; i++) {
        Fiber& f = now.fibers[i];
        const unsigned x = i % block_size.x, y = i / block_size.x % block_size.y, z = i / block_size.x / block_size.y;
        f.thread = {{x, y, z}, i};
        f.state = Fiber::READY, f.last = nullptr, f.group = 0;
        f.copies.clear();
        f.stack_pointer = new_stack(i);
    }
    now.waiting = now.returned = 0;
    now.votes[0] = now.votes[1] = 0;
    block_begins();
    products_begin(now.threads);
    while (now.returned < now.threads && now.error.empty()) {
        bool moved = false;
        for (unsigned i = 0; i < now.threads && now.error.empty(); i++) {
            if (now.fibers[i].state != Fiber::READY) continue;
            moved = true;
            now.running = &now.fibers[i], thread = now.running->thread;
            emulator_switch(&now.scheduler, now.running->stack_pointer);
        }
        if (!moved && now.error.empty()) stuck();
    }
}

bool on_a_stack(const void* p) {
    auto at = static_cast<const unsigned char*>(p);
    return at >= now.stacks && at < now.stacks + MOST_THREADS * STACK;
}

}  // namespace emulator

// Run a kernel, all blocks one after the other. Returns an error in words, or null.
extern "C" __attribute__((visibility("default"))) const char* emulator_launch(
    void (*body)(void**), void** arguments, const unsigned* grid, const unsigned* block, unsigned char* shared,
    size_t bytes) {
    using namespace emulator;
    if (!now.stacks)
        now.stacks = static_cast<unsigned char*>(mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE,
                                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    now.body = body, now.arguments = arguments, now.error.clear();
    for (Meeting* m : now.open) now.unused.push_back(m);  // of a launch that failed
    now.open.clear();
    grid_size = {grid[0], grid[1], grid[2]}, block_size = {block[0], block[1], block[2]};
    now.threads = block_size.x * block_size.y * block_size.z;
    dynamic_shared = shared, shared_bytes = bytes;
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                block_index = {x, y, z};
                run_block();
                if (!now.error.empty()) return now.error.c_str();
            }
    return nullptr;
}
