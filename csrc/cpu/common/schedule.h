// SPDX-License-Identifier: Apache-2.0
// One parallel region for a call: threads prepare panels of x, and when all are there multiply
// units of a partition (partition.h) as they claim them (claims.h).
//
// No thread waits for one that has not begun: that may never come, where calls are nested or the
// pool is small. Then those that have begun do its work.
#pragma once

#include <cstdint>

#include "arena.h"
#include "partition.h"
#include "problem.h"

namespace compressed_linear::cpu {

class Schedule;

// A thread in the region. No unit is handed out twice, and the thread that is given one works on
// it.
class Worker {
 public:
  Worker(Schedule& schedule, int64_t number) : schedule_(schedule), number_(number) {}
  // The next unit to multiply, or -1.
  int64_t next();
  // Says that `cells` of the `all` whose sums are kept at `place` are there; true for the last.
  bool finish(int64_t place, int64_t cells, int64_t all);

 private:
  Schedule& schedule_;
  int64_t number_;
};

struct RegionWork {
  int64_t ranges, units, places;                               // of the partition
  int64_t panels;                                              // to prepare
  void (*prepare)(void* context, int64_t begin, int64_t end);  // some of them
  void (*multiply)(void* context, Worker& worker);             // until worker.next() is -1
  void* context;
};

// An exception of the two functions leaves the region by the thread that it came up in.
void run_region(const Parallel& parallel, const RegionWork& work);

namespace {  // see layouts/planes.h

// A partition, and memory for what parts of K add up to: `place_numbers` T at each of its places.
template <class T>
class Kept {
 public:
  // K is cut for several threads, unless that takes too much memory.
  Kept(WorkShape shape, int64_t place_numbers, int64_t threads)
      : partition_(partition_of(shape, threads, place_numbers * static_cast<int64_t>(sizeof(T)))),
        place_numbers_(place_numbers) {
    if (partition_.is_cut())
      memory_ = static_cast<T*>(kept_arena().reserve(
          static_cast<size_t>(partition_.places() * place_numbers) * sizeof(T)));
  }

  const Partition& partition() const { return partition_; }
  T* at(int64_t place) const { return memory_ + place * place_numbers_; }

  // Multiplies the units that a worker is given: take(part, kept), where kept is null for a part
  // that is all of K, of `most` panels at most. The one that brings the last part of a column
  // and panel calls add(part, kept).
  template <class Take, class Add>
  void multiply(Worker& worker, int64_t most, const Take& take, const Add& add) const {
    for (int64_t unit = worker.next(); unit >= 0; unit = worker.next())
      partition_.for_each_part(unit, most, [&](const WorkPart& part) {
        if (partition_.is_whole(part)) return take(part, static_cast<T*>(nullptr));
        const int64_t place = partition_.place(part);
        T* kept = at(place);
        take(part, kept);
        if (worker.finish(place, part.cell1 - part.cell0, partition_.cells())) add(part, kept);
      });
  }

 private:
  Partition partition_;
  int64_t place_numbers_;
  T* memory_ = nullptr;
};

// Call has kept, prepare(panel begin, panel end) and multiply(worker), all const.
template <class Call>
void run_call(const Parallel& parallel, int64_t panels, const Call& call) {
  const Partition& partition = call.kept.partition();
  run_region(parallel, {partition.ranges(), partition.units(), partition.places(), panels,
                        [](void* context, int64_t begin, int64_t end) {
                          static_cast<const Call*>(context)->prepare(begin, end);
                        },
                        [](void* context, Worker& worker) {
                          static_cast<const Call*>(context)->multiply(worker);
                        },
                        const_cast<Call*>(&call)});
}

}  // namespace
}  // namespace compressed_linear::cpu
