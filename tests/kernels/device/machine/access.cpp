// Every access of memory, and all that can be wrong with it.

#include "machine.h"

namespace device {

namespace {

constexpr u8 NOTHING_THERE = 0xAB;  // what a load gives that must not be

template <class Check>
void check_cells(Machine& m, const Instruction& i, int lane, u64 address, int bytes, Cell* cells, Check check) {
  Moment me = m.moment(lane);
  for (int k = 0; k < bytes; k++) {
    s64 other = -1;
    Kind found = check(cells[k], me, k, other);
    m.report(found, i, lane, address + k, other);
  }
}

}  // namespace

Region* Machine::region_of(Kind outside, const Instruction& i, int lane, u64 address, int bytes) {
  if (address % bytes) return report(MISALIGNED, i, lane, address, bytes), nullptr;
  Region* region = regions.of(address, bytes);
  if (!region) report(outside, i, lane, address, bytes);
  return region;
}

bool Machine::load_global(const Instruction& i, int lane, u64 address, u8* to, int bytes) {
  Region* region = region_of(READS_OUTSIDE, i, lane, address, bytes);
  if (!region) return std::memset(to, NOTHING_THERE, bytes), false;
  check_cells(*this, i, lane, address, bytes, region->cells(address),
              [](Cell& cell, const Moment& me, int, s64& other) { return reads(cell, me, false, other); });
  std::memcpy(to, reinterpret_cast<void*>(address), bytes);
  return true;
}

void Machine::store_global(const Instruction& i, int lane, u64 address, const u8* from, int bytes) {
  Region* region = region_of(WRITES_OUTSIDE, i, lane, address, bytes);
  if (!region) return;
  auto there = reinterpret_cast<u8*>(address);
  check_cells(*this, i, lane, address, bytes, region->cells(address),
              [&](Cell& cell, const Moment& me, int k, s64& other) {
                return writes(cell, me, there[k] != from[k], other);
              });
  changes.before(address, bytes);
  std::memcpy(there, from, bytes);
}

u8* Machine::shared_at(Kind outside, const Instruction& i, int lane, u64 address, int bytes) {
  if (address % bytes) return report(MISALIGNED, i, lane, address, bytes), nullptr;
  u64 at = address - launch.shared_start;
  if (address >= launch.shared_start && at + bytes <= shared.size()) return &shared[at];
  return report(outside, i, lane, address, bytes), nullptr;
}

Cell* Machine::shared_cells_at(u64 address, int bytes) {
  u64 at = address - launch.shared_start;
  return address >= launch.shared_start && at + bytes <= shared.size() ? &shared_cells[at] : nullptr;
}

bool Machine::load_shared(const Instruction& i, int lane, u64 address, u8* to, int bytes, bool by_proxy) {
  address = u32(address);
  u8* there = shared_at(READS_OUTSIDE_SHARED, i, lane, address, bytes);
  if (!there) return std::memset(to, NOTHING_THERE, bytes), false;
  auto check = [&](Cell& cell, const Moment& me, int, s64& other) {
    Kind found = reads(cell, me, true, other);
    if (found != NONE || !by_proxy) return found;
    other = (cell.writer - 1) % MAX_THREADS;
    return fenced[other] > cell.written ? NONE : UNFENCED;
  };
  check_cells(*this, i, lane, address, bytes, shared_cells_at(address, bytes), check);
  std::memcpy(to, there, bytes);
  return true;
}

void Machine::store_shared(const Instruction& i, int lane, u64 address, const u8* from, int bytes) {
  address = u32(address);
  u8* there = shared_at(WRITES_OUTSIDE_SHARED, i, lane, address, bytes);
  if (!there) return;
  auto check = [&](Cell& cell, const Moment& me, int k, s64& other) {
    return writes(cell, me, there[k] != from[k] || !cell.writer, other);
  };
  check_cells(*this, i, lane, address, bytes, shared_cells_at(address, bytes), check);
  std::memcpy(there, from, bytes);
}

void Machine::perform(const Copy& copy) {
  u8 buffer[16] = {};
  const Instruction& i = *copy.instruction;
  if (copy.from % copy.bytes) return report(MISALIGNED, i, copy.lane, copy.from, copy.bytes);
  if (copy.given == copy.bytes) load_global(i, copy.lane, copy.from, buffer, copy.bytes);
  for (int k = 0; k < copy.given && copy.given < copy.bytes; k++) {
    load_global(i, copy.lane, copy.from + k, buffer + k, 1);
  }
  store_shared(i, copy.lane, copy.to, buffer, copy.bytes);
}

}  // namespace device
