// Who last wrote and read a byte, and when: enough to find accesses that nothing puts in order.
//
// Two threads of a program are in order if a barrier lies between what they do, or inside a warp a
// synchronization of the warp. Two programs never are. A write of the value that is there already disturbs
// nobody: threads that hold copies of one value store it more than once.
#pragma once

#include "problems.h"

namespace device {

constexpr u32 MAX_THREADS = 1024;  // of a program

// Whose access it is, and since when other threads' accesses are of no concern.
struct Moment {
  u32 thread;  // program · MAX_THREADS + thread + 1; 0 is nobody
  u32 now, barrier, synchronized;
};

inline u32 program_of(u32 thread) { return (thread - 1) / MAX_THREADS; }
inline u32 warp_of(u32 thread) { return (thread - 1) / WARP; }

struct Cell {
  u32 writer, written, reader, read;
  u8 more_readers;        // than `reader`: bits of Readers
  u8 copies, products;    // asynchronous ones that have not finished writing or reading it
};

enum Readers : u8 { OF_ITS_WARP = 1, OF_ITS_PROGRAM = 2, OF_OTHER_PROGRAMS = 4 };

inline bool in_order(u32 other, u32 when, const Moment& me, bool others_warps = false) {
  bool same_warp = warp_of(other) == warp_of(me.thread) && !others_warps;
  return when < me.barrier || (same_warp && when < me.synchronized);
}

// What is wrong with reading a byte; `other` becomes who is in the way.
inline Kind reads(Cell& cell, const Moment& me, bool must_be_written, s64& other) {
  Kind found = NONE;
  if (must_be_written && !cell.writer) found = UNINITIALIZED;
  if (cell.copies) found = READS_UNFINISHED_COPY;
  if (cell.writer && cell.writer != me.thread) {
    if (program_of(cell.writer) != program_of(me.thread)) {
      found = READS_WRITTEN_ELSEWHERE, other = program_of(cell.writer);
    } else if (!in_order(cell.writer, cell.written, me)) {
      found = READS_WRITTEN, other = (cell.writer - 1) % MAX_THREADS;
    }
  }
  bool is_first = !cell.reader || program_of(cell.reader) != program_of(me.thread);
  if (is_first || cell.read < me.barrier) {
    bool elsewhere = cell.reader && is_first;
    cell.more_readers = (cell.more_readers & OF_OTHER_PROGRAMS) | (elsewhere ? OF_OTHER_PROGRAMS : 0);
    cell.reader = me.thread;
  } else if (cell.reader != me.thread) {
    cell.more_readers |= warp_of(cell.reader) == warp_of(me.thread) ? OF_ITS_WARP : OF_ITS_PROGRAM;
  }
  cell.read = me.now;
  return found;
}

inline Kind against_readers(const Cell& cell, const Moment& me, s64& other) {
  if (!cell.reader) return NONE;
  if ((cell.more_readers & OF_OTHER_PROGRAMS) || program_of(cell.reader) != program_of(me.thread)) {
    return other = program_of(cell.reader), WRITES_READ_ELSEWHERE;
  }
  if (cell.reader == me.thread && !cell.more_readers) return NONE;
  if (in_order(cell.reader, cell.read, me, cell.more_readers & OF_ITS_PROGRAM)) return NONE;
  return other = (cell.reader - 1) % MAX_THREADS, WRITES_READ;
}

// What is wrong with writing a byte, where that changes it.
inline Kind writes(Cell& cell, const Moment& me, bool changes, s64& other) {
  Kind found = NONE;
  if (cell.products) found = WRITES_UNFINISHED_PRODUCT;
  if (cell.copies) found = WRITES_UNFINISHED_COPY;
  if (changes) {
    Kind read = against_readers(cell, me, other);
    found = read == NONE ? found : read;
  }
  if (changes && cell.writer && cell.writer != me.thread) {
    if (program_of(cell.writer) != program_of(me.thread)) {
      found = WRITES_WRITTEN_ELSEWHERE, other = program_of(cell.writer);
    } else if (!in_order(cell.writer, cell.written, me)) {
      found = WRITES_WRITTEN, other = (cell.writer - 1) % MAX_THREADS;
    }
  }
  cell.writer = me.thread, cell.written = me.now;
  return found;
}

}  // namespace device
