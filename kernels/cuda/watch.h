// What the scheduler tells the profiler and sanitizer (watch.cpp), and its own part of it without one.
#pragma once

namespace emulator {

bool on_a_stack(const void* p);    // of any thread

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
