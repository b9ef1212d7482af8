// The memory that a launch may touch, and what it overwrote there.
#pragma once

#include <algorithm>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "shadow.h"

namespace device {

// A stretch of memory that belongs to tensors of the launch. Cells are made for pages that are touched.
class Region {
 public:
  Region(u64 start, u64 end) : start(start), end(end), pages((end >> BITS) - (start >> BITS) + 1) {}

  bool has(u64 address, int size) const { return address >= start && address + size <= end; }

  // Cells of an access that crosses no page, as aligned ones do not.
  Cell* cells(u64 address) {
    auto& page = pages[(address >> BITS) - (start >> BITS)];
    if (!page) page.reset(new Cell[1 << BITS]());
    return &page[address & ((1 << BITS) - 1)];
  }

 private:
  static constexpr int BITS = 12;
  u64 start, end;
  std::vector<std::unique_ptr<Cell[]>> pages;
};

class Regions {
 public:
  // Starts and ends of n regions, which do not overlap.
  Regions(const u64* bounds, int n) {
    for (int k = 0; k < n; k++) all.emplace_back(bounds[2 * k], bounds[2 * k + 1]);
  }

  // The region that an access lies in, or none.
  Region* of(u64 address, int size) {
    if (last < all.size() && all[last].has(address, size)) return &all[last];
    for (last = 0; last < all.size(); last++) {
      if (all[last].has(address, size)) return &all[last];
    }
    return nullptr;
  }

 private:
  std::vector<Region> all;
  size_t last = 0;
};

// What was in memory before a run, so that another run can start from the same, and what the run left there.
class Changes {
 public:
  void before(u64 address, int size) {
    Stretch stretch{address, u8(size), {}, {}};
    std::memcpy(stretch.before, reinterpret_cast<void*>(address), size);
    list.push_back(stretch);
  }

  void undo() {
    for (auto& stretch : list) {
      std::memcpy(stretch.after, reinterpret_cast<void*>(stretch.address), stretch.size);
    }
    for (auto at = list.rbegin(); at != list.rend(); ++at) {
      std::memcpy(reinterpret_cast<void*>(at->address), at->before, at->size);
    }
  }

  // The first address that this run, which was undone, and the other one left different; 0 if there is none.
  u64 differs_from(const Changes& other) const {
    for (auto& stretch : list) {
      auto now = reinterpret_cast<const u8*>(stretch.address);
      if (std::memcmp(now, stretch.after, stretch.size)) return stretch.address;
    }
    auto mine = places(), others = other.places();
    auto [one, two] = std::mismatch(mine.begin(), mine.end(), others.begin(), others.end());
    if (one != mine.end()) return one->first;
    return two == others.end() ? 0 : two->first;
  }

 private:
  struct Stretch {
    u64 address;
    u8 size;
    u8 before[32], after[32];
  };
  std::set<std::pair<u64, u8>> places() const {
    std::set<std::pair<u64, u8>> found;
    for (auto& stretch : list) found.insert({stretch.address, stretch.size});
    return found;
  }
  std::vector<Stretch> list;
};

}  // namespace device
