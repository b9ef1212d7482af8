// What a kernel must not do, and where it did.
#pragma once

#include <set>
#include <utility>
#include <vector>

#include "values.h"

namespace device {

// With the texts of problems.py, in its order.
enum Kind : s32 {
  NONE = -1,
  READS_OUTSIDE,
  WRITES_OUTSIDE,
  READS_OUTSIDE_SHARED,
  WRITES_OUTSIDE_SHARED,
  MISALIGNED,
  UNINITIALIZED,
  READS_WRITTEN,
  WRITES_WRITTEN,
  WRITES_READ,
  READS_WRITTEN_ELSEWHERE,
  WRITES_WRITTEN_ELSEWHERE,
  WRITES_READ_ELSEWHERE,
  READS_UNFINISHED_COPY,
  WRITES_UNFINISHED_COPY,
  WRITES_UNFINISHED_PRODUCT,
  UNFENCED,
  DIVERGED,
  ABSENT_THREAD,
  LOST_THREADS,
  ORDER_MATTERS,
  ENDLESS,
};

struct Problem {
  s32 kind, instruction;
  u32 program, thread;
  u64 address;
  s64 other;  // thread, program, size or mask; what it is follows from the kind
};

// The first problem of each kind at each instruction.
class Problems {
 public:
  void add(const Problem& problem) {
    if (seen.insert({problem.kind, problem.instruction}).second) list.push_back(problem);
  }
  bool any() const { return !list.empty(); }
  const std::vector<Problem>& all() const { return list; }

 private:
  std::set<std::pair<s32, s32>> seen;
  std::vector<Problem> list;
};

}  // namespace device
