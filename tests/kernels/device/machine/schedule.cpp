// Who runs when: programs one after the other, their warps in turns, and the threads of a warp together or,
// where they took different ways, those first that are furthest behind.

#include <algorithm>
#include <numeric>

#include "operations.h"

namespace device {

namespace {

constexpr s64 LONGEST_TURN = 200;  // of a warp in a shuffled order; a choice
constexpr u8 NEVER_WRITTEN = 0xA5;
constexpr u64 NEVER_SET = 0xDEADBEEFDEADBEEF;

// What presets put into registers before a program starts.
enum Preset : s64 { NUMBER, THREAD, LANE, PLACE_X, PLACE_Y, PLACE_Z, GRID_X, GRID_Y, GRID_Z };

}  // namespace

void Machine::run() {
  if (launch.only >= 0) return run_program(launch.only);
  u32 n_programs = launch.grid[0] * launch.grid[1] * launch.grid[2];
  std::vector<u32> numbers(n_programs);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (order == BACKWARD) std::reverse(numbers.begin(), numbers.end());
  for (u32 k = n_programs; order == SHUFFLED && k > 1; k--) std::swap(numbers[k - 1], numbers[random(k)]);
  for (u32 number : numbers) run_program(number);
}

void Machine::run_program(u32 number) {
  program = number, barrier = ++now;
  shared.assign(launch.shared_bytes, NEVER_WRITTEN);
  shared_cells.assign(launch.shared_bytes, Cell{});
  fenced.assign(MAX_THREADS, 0);
  start_warps(number);
  run_warps();
}

void Machine::start_warps(u32 number) {
  const s32* grid = launch.grid;
  u32 place[3] = {number % grid[0], number / grid[0] % grid[1], number / grid[0] / grid[1]};
  warps.resize((launch.n_threads + WARP - 1) / WARP);
  for (size_t k = 0; k < warps.size(); k++) {
    Warp& warp = warps[k];
    int n = std::min(WARP, launch.n_threads - int(k) * WARP);
    warp.registers.assign(size_t(launch.n_registers) * WARP, NEVER_SET);
    std::fill_n(warp.next, WARP, 0);
    warp.alive = n == WARP ? ALL : (Mask(1) << n) - 1;
    warp.together = true, warp.state = RUNNING, warp.synchronized = 0;
    warp.copies.clear(), warp.products.clear();
    warp.copy_group = warp.product_group = 0;
    preset(warp, k * WARP, place);
  }
}

void Machine::preset(Warp& warp, u32 first_thread, const u32* place) {
  for (int k = 0; k < launch.n_presets; k++) {
    const s64* entry = launch.presets + 3 * k;
    u64* lanes = warp.registers.data() + entry[0] * WARP;
    for (int lane = 0; lane < WARP; lane++) {
      u64 value = entry[2];
      if (entry[1] == THREAD) value = first_thread + lane;
      else if (entry[1] == LANE) value = lane;
      else if (entry[1] >= GRID_X) value = launch.grid[entry[1] - GRID_X];
      else if (entry[1] >= PLACE_X) value = place[entry[1] - PLACE_X];
      lanes[lane] = value;
    }
  }
}

void Machine::run_warps() {
  std::vector<int> ready;
  while (true) {
    ready.clear();
    for (size_t k = 0; k < warps.size(); k++) {
      if (warps[k].state == RUNNING) ready.push_back(k);
    }
    if (!ready.empty()) {
      run_warp(choose_warp(ready), order == SHUFFLED ? 1 + random(LONGEST_TURN) : INT64_MAX);
    } else if (std::any_of(warps.begin(), warps.end(), [](Warp& warp) { return warp.state == WAITING; })) {
      release_warps();
    } else {
      return;
    }
  }
}

int Machine::choose_warp(const std::vector<int>& ready) {
  if (order == SHUFFLED) return ready[random(ready.size())];
  return order == BACKWARD ? ready.back() : ready.front();
}

// All threads are at the barrier, or will never be.
void Machine::release_warps() {
  for (size_t k = 0; k < warps.size(); k++) {
    if (warps[k].state == WAITING) {
      warps[k].state = RUNNING;
    } else {
      auto waiting = std::find_if(warps.begin(), warps.end(), [](Warp& w) { return w.state != ENDED; });
      warp_number = waiting - warps.begin();
      report(LOST_THREADS, launch.code[waiting->next[__builtin_ctz(waiting->alive)] - 1], 0, 0, k);
    }
  }
  barrier = ++now;
}

void Machine::run_warp(int number, s64 turn) {
  warp_number = number, warp = &warps[number];
  while (turn-- > 0 && step()) continue;
}

// One instruction of the threads that are furthest behind; whether the warp can go on.
bool Machine::step() {
  s32 at;
  Mask active = at_lowest(at);
  const Instruction& i = launch.code[at];
  Mask taking = guarded(i, active);
  if (++now == UINT32_MAX) return report(ENDLESS, i, 0, 0), warp->state = ENDED, false;
  switch (i.operation) {
    case BRANCH:
      branch(at, i, active, taking);
      return true;
    case RETURN:
      advance(at, active & ~taking);
      warp->alive &= ~taking;
      if (!warp->alive) warp->state = ENDED;
      return warp->alive;
    case BARRIER:
      if (taking != warp->alive) report(DIVERGED, i, 0, 0, taking);
      advance(at, active);
      warp->state = WAITING;
      return false;
  }
  if (taking) operation(i.operation)(*this, i, taking);
  advance(at, active);
  return true;
}

Mask Machine::at_lowest(s32& at) {
  at = warp->next[__builtin_ctz(warp->alive)];
  if (warp->together) return warp->alive;
  for_each(warp->alive, [&](int lane) { at = std::min(at, warp->next[lane]); });
  Mask active = 0;
  for_each(warp->alive, [&](int lane) { active |= Mask(warp->next[lane] == at) << lane; });
  warp->together = active == warp->alive;
  return active;
}

Mask Machine::guarded(const Instruction& i, Mask active) {
  if (i.guard < 0) return active;
  const u64* guard = lanes(i.guard);
  Mask is_true = 0;
  for (int lane = 0; lane < WARP; lane++) is_true |= Mask(guard[lane] & 1) << lane;
  return active & (i.unless ? ~is_true : is_true);
}

void Machine::branch(s32 at, const Instruction& i, Mask active, Mask taken) {
  if (taken && taken != active) warp->together = false;
  for_each(active, [&](int lane) { warp->next[lane] = taken >> lane & 1 ? i.jump : at + 1; });
}

void Machine::advance(s32 at, Mask active) {
  for_each(active, [&](int lane) { warp->next[lane] = at + 1; });
}

}  // namespace device
