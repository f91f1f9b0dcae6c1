// In place of cuda/include/async_copy.cuh.
#pragma once
#include "common.cuh"

inline void copy16(u32 to, const void* from, bool valid = true) { machine::copy(to, from, 16, valid ? 16 : 0); }
inline void copy16_near(u32 to, const void* from, bool valid) { machine::copy(to, from, 16, valid ? 16 : 0); }
inline void copy4(u32 to, const void* from, u32 bytes) { machine::copy(to, from, 4, bytes); }
inline void fetch_into_l2(const u8* at) { machine::fetched.push_back(at); }
inline void commit() { machine::commit_copies(); }
template <int N> void wait_for_copies() { machine::wait_for_copies(N); }
