// What threads of a warp do together: shuffles, reductions, votes and the synchronization of a warp.

#include <algorithm>

#include "operations.h"

namespace device {

namespace {

// Sources: value, lane or distance, clamp, members. The other thread's value, or one's own past the edge.
template <class F>
void shuffle(const std::string& name, F) {
  define(name, [](Machine& m, const Instruction& i, Mask active) {
    u64 values[WARP], found[WARP];
    std::copy_n(m.source(i, 0), WARP, values);
    for_each(active, [&](int lane) {
      Mask members = get<u32>(m.source(i, 3), lane) & m.warp->alive;
      if (members & ~active) m.report(DIVERGED, i, lane, 0, active);
      int from = F{}(lane, get<s32>(m.source(i, 1), lane));
      if (from < 0 || from >= WARP) from = lane;
      if (!(active >> from & 1)) m.report(ABSENT_THREAD, i, lane, 0, from);
      found[lane] = u32(values[from]);
    });
    u64* to = m.target(i, 0);
    for_each(active, [&](int lane) { to[lane] = found[lane]; });
  });
}

template <class T, class F>
void reduction(const std::string& type, F) {
  define("redux.sync." + type, [](Machine& m, const Instruction& i, Mask active) {
    if (active != m.warp->alive) m.report(DIVERGED, i, 0, 0, active);
    const u64* from = m.source(i, 0);
    T total = get<T>(from, __builtin_ctz(active));
    bool is_first = true;
    for_each(active, [&](int lane) {
      total = is_first ? total : F{}(total, get<T>(from, lane));
      is_first = false;
    });
    u64* to = m.target(i, 0);
    for_each(active, [&](int lane) { put<T>(to, lane, total); });
  });
}

void ballot(Machine& m, const Instruction& i, Mask active) {
  if (active != m.warp->alive) m.report(DIVERGED, i, 0, 0, active);
  Mask votes = 0;
  for_each(active, [&](int lane) { votes |= Mask(m.source(i, 0)[lane] & 1) << lane; });
  u64* to = m.target(i, 0);
  for_each(active, [&](int lane) { put<u32>(to, lane, votes); });
}

void synchronize(Machine& m, const Instruction& i, Mask active) {
  if (active != m.warp->alive) m.report(DIVERGED, i, 0, 0, active);
  m.warp->synchronized = ++m.now;
}

}  // namespace

void define_exchanges() {
  shuffle("shfl.sync.bfly.b32", [](int lane, int by) { return lane ^ by; });
  shuffle("shfl.sync.up.b32", [](int lane, int by) { return lane - by; });
  shuffle("shfl.sync.down.b32", [](int lane, int by) { return lane + by; });
  shuffle("shfl.sync.idx.b32", [](int, int from) { return from & (WARP - 1); });
  reduction<u32>("add.s32", [](u32 x, u32 y) { return x + y; });
  reduction<u32>("add.u32", [](u32 x, u32 y) { return x + y; });
  reduction<s32>("min.s32", [](s32 x, s32 y) { return std::min(x, y); });
  reduction<s32>("max.s32", [](s32 x, s32 y) { return std::max(x, y); });
  reduction<u32>("min.u32", [](u32 x, u32 y) { return std::min(x, y); });
  reduction<u32>("max.u32", [](u32 x, u32 y) { return std::max(x, y); });
  reduction<u32>("and.b32", [](u32 x, u32 y) { return x & y; });
  reduction<u32>("or.b32", [](u32 x, u32 y) { return x | y; });
  reduction<u32>("xor.b32", [](u32 x, u32 y) { return x ^ y; });
  define("vote.sync.ballot.b32", ballot);
  define("bar.warp.sync", synchronize);
}

}  // namespace device
