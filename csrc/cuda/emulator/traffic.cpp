// SPDX-License-Identifier: Apache-2.0
#include "traffic.h"

#include <algorithm>
#include <map>
#include <utility>

namespace compressed_linear::cuda::emulator {
namespace {

constexpr size_t kSector = 32;

Traffic& traffic(Report& report, Kind kind) {
  switch (kind) {
    case Kind::shared_load:
      return report.shared_loads;
    case Kind::shared_store:
      return report.shared_stores;
    case Kind::matrix_load:
      return report.matrix_loads;
    case Kind::shared_copy:
      return report.shared_copies;
    case Kind::global_load:
      return report.global_loads;
    case Kind::global_store:
      return report.global_stores;
    default:
      return report.global_copies;
  }
}

// One access of a warp by some of its lanes, in order of lanes.
void count(const Access* const* accesses, int lanes, Report& report) {
  Traffic& t = traffic(report, accesses[0]->kind);
  ++t.accesses;
  const int bytes = accesses[0]->bytes;
  if (accesses[0]->kind >= Kind::global_load) {
    std::vector<uint64_t> sectors, units;
    for (int i = 0; i < lanes; ++i) {
      sectors.push_back(accesses[i]->address / kSector);
      units.push_back(accesses[i]->address / static_cast<uint64_t>(bytes));
    }
    const auto distinct = [](std::vector<uint64_t>& v) {
      std::sort(v.begin(), v.end());
      return static_cast<int64_t>(std::unique(v.begin(), v.end()) - v.begin());
    };
    t.transactions += distinct(sectors);
    t.least += (distinct(units) * bytes + static_cast<int64_t>(kSector) - 1) /
               static_cast<int64_t>(kSector);
    return;
  }
  // Shared memory serves 128 bytes at a time: all lanes, a half or a quarter of them.
  const int together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (int begin = 0; begin < lanes; begin += together) {
    const int end = std::min(begin + together, lanes);
    std::vector<uint64_t> words;
    for (int i = begin; i < end; ++i)
      for (uint64_t word = accesses[i]->address / 4;
           word <= (accesses[i]->address + static_cast<uint64_t>(bytes) - 1) / 4; ++word)
        words.push_back(word);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int banks[32] = {}, most = 0;
    for (const uint64_t word : words) most = std::max(most, ++banks[word % 32]);
    t.transactions += most;
    t.least += 1;
  }
}

}  // namespace

void count_accesses(const std::vector<Access>* const (&lanes)[kWarp], Report& report) {
  bool same_sites = true;
  for (int lane = 1; lane < kWarp && same_sites; ++lane) {
    same_sites = lanes[lane]->size() == lanes[0]->size();
    for (size_t i = 0; same_sites && i < lanes[0]->size(); ++i)
      same_sites = (*lanes[lane])[i].site == (*lanes[0])[i].site;
  }
  if (same_sites) {
    const Access* group[kWarp];
    for (size_t i = 0; i < lanes[0]->size(); ++i) {
      for (int lane = 0; lane < kWarp; ++lane) group[lane] = &(*lanes[lane])[i];
      count(group, kWarp, report);
    }
    return;
  }
  std::map<std::pair<const void*, int>, std::vector<const Access*>> groups;
  for (int lane = 0; lane < kWarp; ++lane) {
    std::map<const void*, int> seen;
    for (const Access& access : *lanes[lane])
      groups[{access.site, seen[access.site]++}].push_back(&access);
  }
  for (const auto& entry : groups)
    count(entry.second.data(), static_cast<int>(entry.second.size()), report);
}

}  // namespace compressed_linear::cuda::emulator
