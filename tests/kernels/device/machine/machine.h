// The state of a launch: the program that runs now, its warps, and the memory they share.
#pragma once

#include <deque>
#include <string>

#include "memory.h"

namespace device {

// As program.py writes it.
struct Instruction {
  s32 operation, guard, unless;  // unless: the guard must be false
  s32 operands, n_targets, n_sources;
  s32 jump, bytes, items, flags;
  s64 offset, second_offset;
};

// cp.async: a copy to shared memory that somebody waits for later.
struct Copy {
  const Instruction* instruction;
  int lane, group, bytes, given;  // bytes past those given are zeros
  u64 to, from;
};

// wgmma.mma_async: this warp's part of a product that somebody waits for later.
struct Product {
  const Instruction* instruction;
  int group;
  bool adds;
  u64 a, b;  // descriptors
  u32 a_registers[4][WARP];
};

enum State { RUNNING, WAITING, ENDED };

struct Warp {
  std::vector<u64> registers;
  s32 next[WARP];  // instruction of each thread
  Mask alive;
  bool together;  // whether all threads alive are at the same instruction
  State state;
  u32 synchronized;
  std::deque<Copy> copies;
  std::deque<Product> products;
  int copy_group, product_group;
};

enum Order : s32 { FORWARD, BACKWARD, SHUFFLED };

// As machine.py writes it.
struct Launch {
  const Instruction* code;
  const s32* operands;
  const s64* presets;  // [n_presets, 3]: register, what it holds, and the number if that is one
  const u64* regions;  // [n_regions, 2]: start and end
  const s32* orders;   // [n_orders, 2]: an Order, and whether asynchronous work is done at once
  Problem* problems;
  s32 n_instructions, n_registers, n_threads, n_presets, n_regions, n_orders, max_problems;
  s32 grid[3];
  s32 only;  // the one program of the grid that runs, or -1 for all
  u32 shared_start, shared_bytes;
  u64 seed;
};

struct Machine {
  const Launch& launch;
  Regions& regions;
  Problems& problems;
  Changes& changes;
  Order order;
  bool at_once;
  u64 random_state;
  std::vector<Warp> warps;
  std::vector<u8> shared;
  std::vector<Cell> shared_cells;
  std::vector<u32> fenced;  // when each thread last had a proxy fence
  Warp* warp = nullptr;     // that runs now
  u32 warp_number = 0, program = 0, now = 1, barrier = 1;

  u64* lanes(s32 k) { return warp->registers.data() + size_t(k) * WARP; }
  u64* target(const Instruction& i, int k) { return lanes(launch.operands[i.operands + k]); }
  const u64* source(const Instruction& i, int k) { return target(i, i.n_targets + k); }

  u64 random(u64 below) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return random_state % below;
  }

  Moment moment(int lane) const {
    u32 thread = program * MAX_THREADS + warp_number * WARP + lane + 1;
    return {thread, now, barrier, warp->synchronized};
  }

  void report(Kind kind, const Instruction& i, int lane, u64 address, s64 other = -1) {
    if (kind == NONE) return;
    problems.add({kind, s32(&i - launch.code), program, warp_number * WARP + lane, address, other});
  }

  // access.cpp; those that give a bool say whether the access is possible.
  bool load_global(const Instruction& i, int lane, u64 address, u8* to, int bytes);
  void store_global(const Instruction& i, int lane, u64 address, const u8* from, int bytes);
  bool load_shared(const Instruction& i, int lane, u64 address, u8* to, int bytes, bool by_proxy = false);
  void store_shared(const Instruction& i, int lane, u64 address, const u8* from, int bytes);
  Cell* shared_cells_at(u64 address, int bytes);  // nothing where that is outside
  void perform(const Copy& copy);

  // schedule.cpp
  void run();

 private:
  Region* region_of(Kind outside, const Instruction& i, int lane, u64 address, int bytes);
  u8* shared_at(Kind outside, const Instruction& i, int lane, u64 address, int bytes);
  void run_program(u32 number);
  void start_warps(u32 number);
  void preset(Warp& warp, u32 first_thread, const u32* place);
  void run_warps();
  int choose_warp(const std::vector<int>& ready);
  void release_warps();
  void run_warp(int number, s64 quantum);
  bool step();
  Mask at_lowest(s32& at);
  Mask guarded(const Instruction& i, Mask active);
  void branch(s32 at, const Instruction& i, Mask active, Mask taken);
  void advance(s32 at, Mask active);
};

}  // namespace device
