// Loads, stores and asynchronous copies.

#include "operations.h"

namespace device {

namespace {

template <bool SHARED>
void load(Machine& m, const Instruction& i, Mask active) {
  u64 addresses[WARP];
  std::memcpy(addresses, m.source(i, 0), sizeof addresses);  // a target may be the same register
  int bytes = i.bytes * i.items;
  for_each(active, [&](int lane) {
    u8 values[32];
    u64 address = addresses[lane] + i.offset;
    if (SHARED) m.load_shared(i, lane, address, values, bytes);
    else m.load_global(i, lane, address, values, bytes);
    for (int k = 0; k < i.items; k++) {
      u64 word = 0;
      std::memcpy(&word, values + k * i.bytes, i.bytes);
      m.target(i, k)[lane] = word;
    }
  });
}

template <bool SHARED>
void store(Machine& m, const Instruction& i, Mask active) {
  int bytes = i.bytes * i.items;
  for_each(active, [&](int lane) {
    u8 values[32];
    for (int k = 0; k < i.items; k++) std::memcpy(values + k * i.bytes, &m.source(i, 1 + k)[lane], i.bytes);
    u64 address = m.source(i, 0)[lane] + i.offset;
    if (SHARED) m.store_shared(i, lane, address, values, bytes);
    else m.store_global(i, lane, address, values, bytes);
  });
}

// Bytes that a copy writes at an unknown time: from its start until somebody waits for it.
void mark(Machine& m, const Copy& copy, int by) {
  if (Cell* cells = m.shared_cells_at(copy.to, copy.bytes)) {
    for (int k = 0; k < copy.bytes; k++) cells[k].copies += by;
  }
}

// Sources: where to, where from, and how many bytes if not all.
void start_copy(Machine& m, const Instruction& i, Mask active) {
  for_each(active, [&](int lane) {
    int given = i.n_sources > 2 ? get<s32>(m.source(i, 2), lane) : i.bytes;
    u64 to = u32(m.source(i, 0)[lane] + i.offset), from = m.source(i, 1)[lane] + i.second_offset;
    Copy copy{&i, lane, m.warp->copy_group, i.bytes, given, to, from};
    if (m.at_once) m.perform(copy);
    mark(m, copy, 1);
    m.warp->copies.push_back(copy);
  });
}

// Of groups that began before one.
void end_copies(Machine& m, int group) {
  auto& copies = m.warp->copies;
  for (; !copies.empty() && copies.front().group < group; copies.pop_front()) {
    mark(m, copies.front(), -1);
    if (!m.at_once) m.perform(copies.front());
  }
}

void commit_copies(Machine& m, const Instruction&, Mask) { m.warp->copy_group++; }

// All groups but the latest `offset`.
void wait_for_copies(Machine& m, const Instruction& i, Mask) {
  end_copies(m, m.warp->copy_group - int(i.offset));
}

void wait_for_all_copies(Machine& m, const Instruction&, Mask) { end_copies(m, ++m.warp->copy_group); }

void fence(Machine& m, const Instruction&, Mask active) {
  for_each(active, [&](int lane) { m.fenced[m.warp_number * WARP + lane] = m.now; });
}

}  // namespace

void define_transfers() {
  define("ld.global", load<false>), define("ld.shared", load<true>);
  define("st.global", store<false>), define("st.shared", store<true>);
  define("cp.async", start_copy);
  define("cp.async.commit_group", commit_copies);
  define("cp.async.wait_group", wait_for_copies);
  define("cp.async.wait_all", wait_for_all_copies);
  define("fence.proxy.async", fence);
  define("nothing", [](Machine&, const Instruction&, Mask) {});
}

}  // namespace device
