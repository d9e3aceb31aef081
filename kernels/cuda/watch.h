// What the parts of the emulator tell each other: the scheduler (emulator.cpp), the products of warpgroups
// (emulated_wgmma.cpp), the profiler and sanitizer (watch.cpp), or what stands in its place without one.
#pragma once

namespace emulator {

bool on_a_stack(const void* p);    // of any thread

void products_begin(unsigned threads);            // with a block
void products_end();                              // with a thread
void about_to_write(const void* p);               // shared memory, now or later
void written(const void* p, size_t bytes);        // a fence must follow before a product reads it

#ifdef WATCHED
void block_begins();
void block_met();                       // all threads of the block have come to a barrier
void warp_met(unsigned warp, bool all);  // lanes of a warp have met; all that there are, or some
void returned(unsigned number);          // a thread has come to its end
#else
inline void block_begins() {}
inline void block_met() {}
inline void warp_met(unsigned, bool) {}
inline void returned(unsigned) {}
#endif

}  // namespace emulator
