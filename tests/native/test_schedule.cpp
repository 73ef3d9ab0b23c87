// SPDX-License-Identifier: Apache-2.0
// How work is cut among threads (common/partition.h), which of them take it (common/claims.h) and
// that none waits for one that never comes (common/schedule.h).
//
// The cost of a range is that of its cells: tiles times rows of its panels and two for decoding.
// Balance is the largest range over the mean. Threads of equal speed take nothing from each other,
// so it bounds the time of a call; what threads of unequal speed do is simulated.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <queue>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/common/claims.h"
#include "cpu/common/nodes.h"
#include "cpu/common/schedule.h"

namespace cl = compressed_linear::cpu;

namespace {

int failures = 0;

void check(bool good, const std::string& message) {
  if (good) return;
  if (++failures <= 20) std::printf("FAIL %s\n", message.c_str());
}

// Linear layers of published models, [N, K], as they run with one rank.
struct Layer {
  const char* of;
  int64_t n, k;
};
constexpr Layer kLayers[] = {{"Gemma 3 270M qkv", 1536, 640},
                             {"Gemma 3 270M o", 640, 1024},
                             {"Gemma 3 270M gate_up", 4096, 640},
                             {"Gemma 3 270M down", 640, 2048},
                             {"Gemma 3 270M head", 262144, 640},
                             {"Qwen 2.5 0.5B qkv", 1152, 896},
                             {"Qwen 2.5 0.5B gate_up", 9728, 896},
                             {"Qwen 2.5 0.5B down", 896, 4864},
                             {"Qwen 2.5 0.5B head", 151936, 896},
                             {"Llama 3.2 1B gate_up", 16384, 2048},
                             {"Llama 3.2 1B down", 2048, 8192},
                             {"Qwen 3 4B qkv", 6144, 2560},
                             {"Qwen 3 4B gate_up", 19456, 2560},
                             {"Qwen 3 4B down", 2560, 9728},
                             {"Llama 3 8B qkv", 6144, 4096},
                             {"Llama 3 8B o", 4096, 4096},
                             {"Llama 3 8B gate_up", 28672, 4096},
                             {"Llama 3 8B down", 4096, 14336},
                             {"Llama 3 8B head", 128256, 4096},
                             {"Mixtral expert down", 4096, 14336},
                             {"Qwen 2.5 32B qkv", 7168, 5120},
                             {"Qwen 2.5 32B gate_up", 55296, 5120},
                             {"Qwen 2.5 32B down", 5120, 27648},
                             {"Llama 3 70B qkv", 10240, 8192},
                             {"Llama 3 70B gate_up", 57344, 8192},
                             {"Llama 3 70B down", 8192, 28672},
                             {"Llama 3 405B down", 16384, 53248},
                             {"GPT-2 head", 50257, 768},
                             {"DeepSeek V3 shared gate_up", 4096, 7168}};

cl::WorkShape shape_of(int64_t n, int64_t k, int64_t rows, int64_t panel_rows, int64_t column,
                       int64_t cell) {
  const cl::Geometry g = cl::make_geometry(n, k, 128, {cl::Kind::integer, 4});
  cl::WorkShape shape = cl::work_of(g, cl::Panels(rows, panel_rows));
  shape.column = column;
  shape.cells = cell == 0 ? 1 : (g.padded_k + cell - 1) / cell;
  shape.cuts_ragged = true;
  return shape;
}

int64_t cost_of(const cl::WorkShape& shape, const cl::WorkPart& part) {
  int64_t panels = 0;
  for (int64_t panel = part.panel0; panel < part.panel1; ++panel)
    panels += panel < shape.higher ? shape.high : shape.low;
  return (part.cell1 - part.cell0) * (part.tile1 - part.tile0) * panels;
}

int64_t cost_of_unit(const cl::WorkShape& shape, const cl::Partition& partition, int64_t unit) {
  int64_t cost = 0;
  partition.for_each_part(unit, shape.panels,
                          [&](const cl::WorkPart& part) { cost += cost_of(shape, part); });
  return cost;
}

// Units follow each other without gaps, and everything that belongs to one column and panel meets
// at one place, which it has to itself.
void check_cover(const cl::WorkShape& shape, int64_t threads, const std::string& what) {
  const cl::Partition partition = cl::partition_of(shape, threads, 1);
  std::map<int64_t, std::pair<int64_t, int64_t>> cells_at;  // place: column and panel, cells
  int64_t before = 0, tile = 0, panel = 0, cell = 0;
  bool in_order = true, own_place = true;
  for (int64_t unit = 0; unit < partition.units(); ++unit) {
    in_order = in_order && partition.border(unit) >= before;
    before = partition.border(unit);
    partition.for_each_part(unit, 3, [&](const cl::WorkPart& part) {
      in_order = in_order && part.tile0 == tile && part.panel0 == panel && part.cell0 == cell &&
                 part.cell1 > part.cell0 && part.panel1 > part.panel0 && part.unit == unit;
      cell = part.cell1 == partition.cells() ? 0 : part.cell1;
      panel = cell == 0 ? part.panel1 : panel;
      if (panel == shape.panels) panel = 0, tile = part.tile1;
      if (partition.is_whole(part)) return;
      const int64_t place = partition.place(part);
      const int64_t job = part.tile0 * shape.panels + part.panel0;
      auto& found = cells_at.emplace(place, std::make_pair(job, 0)).first->second;
      own_place = own_place && place >= 0 && place < partition.places() && found.first == job;
      found.second += part.cell1 - part.cell0;
      // Where parts begin are the cuts that an engine is told of.
      bool told = part.cell0 == 0;
      partition.for_each_cut(part, [&](int64_t at, int64_t begin) {
        told = told || (begin == part.cell0 && at == partition.place_of(part.unit));
      });
      own_place = own_place && told;
    });
  }
  for (const auto& [place, found] : cells_at)
    own_place = own_place && found.second == partition.cells();
  check(in_order && tile == shape.tiles && panel == 0 && cell == 0, what + ": units have gaps");
  check(own_place, what + ": parts of K do not meet");
}

// The largest range over the mean, and how many cells the mean has.
struct Balance {
  double largest, cells;
};

Balance balance_of(const cl::WorkShape& shape, int64_t threads, int64_t place_bytes) {
  const cl::Partition partition = cl::partition_of(shape, threads, place_bytes);
  int64_t total = 0, largest = 0;
  for (int64_t range = 0; range < partition.ranges(); ++range) {
    int64_t cost = 0;
    for (int64_t i = 0; i < partition.units_of_range(); ++i)
      cost += cost_of_unit(shape, partition, range * partition.units_of_range() + i);
    total += cost;
    largest = std::max(largest, cost);
  }
  const auto ranges = static_cast<double>(partition.ranges());
  const auto cell = static_cast<double>(shape.column * (shape.higher > 0 ? shape.high : shape.low));
  return {static_cast<double>(largest) * ranges / static_cast<double>(total),
          static_cast<double>(total) / cell / ranges};
}

// From so many cells for each thread on the largest range is at most a twentieth above the mean.
constexpr double kEnoughCells = 20;

void check_balance(int64_t step) {
  struct Path {
    const char* name;
    int64_t panel_rows, column, cell;
  };
  constexpr Path kPaths[] = {{"digits", 2, 4, 128},
                             {"few rows", 6, 4, 128},
                             {"integers", 6, 4, 32},
                             {"many rows", 6, 4, 0}};
  int64_t balanced = 0, small = 0;
  for (const Path& path : kPaths) {
    double worst = 0, worst_small = 0;
    int64_t of_path = 0, enough = 0, within = 0;
    for (const Layer& layer : kLayers)
      for (const int64_t ranks : {1, 2, 4})
        for (const bool along_k : {false, true}) {
          const int64_t n = along_k ? layer.n : (layer.n + ranks - 1) / ranks;
          const int64_t k = along_k ? layer.k / ranks : layer.k;
          if (k % 128 != 0) continue;
          for (const int64_t rows : {1, 4, 16, 64, 256}) {
            const cl::WorkShape shape =
                shape_of(n, k, rows, path.panel_rows, path.column, path.cell);
            const int64_t place_bytes = (k / 128 + 1) * std::min(rows, path.panel_rows) * 64 * 4;
            for (int64_t threads = 1 + of_path % step; threads <= 192; threads += step) {
              const Balance b = balance_of(shape, threads, place_bytes);
              ++of_path;
              within += b.largest <= 1.05;
              if (b.cells >= kEnoughCells) {
                ++enough;
                worst = std::max(worst, b.largest);
                check(b.largest <= 1.05,
                      std::string(path.name) + " of " + layer.of + " n=" + std::to_string(n) +
                          " k=" + std::to_string(k) + " m=" + std::to_string(rows) +
                          " threads=" + std::to_string(threads) + ": the largest range is " +
                          std::to_string(b.largest) + " of the mean");
              } else {
                worst_small = std::max(worst_small, (b.largest - 1) * b.cells);
                check((b.largest - 1) * b.cells <= 1.0 + 0.04 * b.cells,
                      std::string(path.name) + " of " + layer.of +
                          ": a range is more than a cell above the mean");
              }
            }
          }
        }
    std::printf(
        "%s: of %lld cases %lld have 20 cells a thread, largest range %.3f of the mean; %lld "
        "within "
        "5 %% in all, the others at most %.2f cells above the mean\n",
        path.name, static_cast<long long>(of_path), static_cast<long long>(enough), worst,
        static_cast<long long>(within), worst_small);
    balanced += enough;
    small += of_path - enough;
  }
  check(balanced > 0 && small > 0, "cases of one kind are missing");
}

// Time until the last unit is done, by threads of given speeds that begin at given times.
double makespan(const cl::WorkShape& shape, const cl::Partition& partition,
                const std::vector<double>& speed, const std::vector<double>& begins,
                const uint8_t* node_of) {
  cl::Claims claims;
  claims.begin(partition.ranges(), partition.units(), node_of);
  std::vector<double> cost(static_cast<size_t>(partition.units()));
  for (size_t unit = 0; unit < cost.size(); ++unit)
    cost[unit] = static_cast<double>(cost_of_unit(shape, partition, static_cast<int64_t>(unit)));
  using Event = std::pair<double, size_t>;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> ready;
  for (size_t i = 0; i < speed.size(); ++i) {
    ready.push({begins[i], i});
  }
  double last = 0;
  while (!ready.empty()) {
    const auto [now, thread] = ready.top();
    ready.pop();
    claims.join(static_cast<int64_t>(thread));
    const int64_t unit = claims.next(static_cast<int64_t>(thread));
    if (unit < 0) continue;
    const double end = now + cost[static_cast<size_t>(unit)] / speed[thread];
    last = std::max(last, end);
    ready.push({end, thread});
  }
  return last;
}

void check_unequal_threads() {
  const cl::WorkShape shape = shape_of(4096, 4096, 1, 2, 4, 128);
  for (const int64_t threads : {2, 3, 8, 16, 60}) {
    const auto count = static_cast<size_t>(threads);
    const cl::Partition partition = cl::partition_of(shape, threads, 1);
    double total = 0, largest = 0;
    for (int64_t unit = 0; unit < partition.units(); ++unit) {
      const auto cost = static_cast<double>(cost_of_unit(shape, partition, unit));
      total += cost;
      largest = std::max(largest, cost);
    }
    const std::vector<double> at_once(count, 0.0);
    // One at half the speed: the others take over what it does not come to. Nothing is cut finer
    // than a unit, so the last one may be late by one that the slow thread took.
    std::vector<double> speed(count, 1.0);
    speed[count / 2] = 0.5;
    const double ideal = total / (static_cast<double>(threads) - 0.5);
    const double slow = makespan(shape, partition, speed, at_once, nullptr);
    check(slow <= ideal + 2 * largest, "a slow thread among " + std::to_string(threads) +
                                           " holds up the others: " + std::to_string(slow / ideal));
    // One that never comes.
    speed[count / 2] = 1.0;
    std::vector<double> begins(count, 0.0);
    begins[0] = 1e30;
    const double without = makespan(shape, partition, speed, begins, nullptr);
    check(without <= total / static_cast<double>(threads - 1) + largest,
          "work of a thread that does not come is left to few of " + std::to_string(threads));
    std::printf("%lld threads: one at half the speed %.3f of the ideal time, one missing %.3f\n",
                static_cast<long long>(threads), slow / ideal,
                without * static_cast<double>(threads - 1) / total);
  }
}

void check_nodes() {
  // Nodes of threads one after another, and alternating.
  for (const int64_t nodes : {2, 3, 4, 8})
    for (const bool alternate : {false, true})
      for (const int64_t threads : {2 * nodes, 7 * nodes, 24 * nodes}) {
        std::vector<uint8_t> node_of(static_cast<size_t>(threads));
        for (int64_t i = 0; i < threads; ++i)
          node_of[static_cast<size_t>(i)] =
              static_cast<uint8_t>(alternate ? i % nodes : i * nodes / threads);
        const std::string what =
            std::to_string(threads) + " threads on " + std::to_string(nodes) + " nodes";
        const cl::WorkShape shape = shape_of(28672, 4096, 1, 2, 4, 128);
        const cl::Partition partition = cl::partition_of(shape, threads, 1);
        double total = 0;
        for (int64_t unit = 0; unit < partition.units(); ++unit)
          total += static_cast<double>(cost_of_unit(shape, partition, unit));
        const std::vector<double> speed(node_of.size(), 1.0), begins(node_of.size(), 0.0);
        const double time = makespan(shape, partition, speed, begins, node_of.data());
        check(time * static_cast<double>(threads) <= 1.05 * total, what + " are not balanced");

        // The threads of one node have all its units to themselves, though those of the others
        // wait.
        cl::Claims claims;
        claims.begin(partition.ranges(), partition.units(), node_of.data());
        for (int64_t i = 0; i < threads; ++i) claims.join(i);
        int64_t own = 0;
        bool kept_apart = true;
        for (int64_t unit = claims.next(0); unit >= 0; unit = claims.next(0), ++own)
          kept_apart =
              kept_apart &&
              node_of[static_cast<size_t>(unit / partition.units_of_range())] == node_of[0];
        int64_t of_node = std::count(node_of.begin(), node_of.end(), node_of[0]);
        check(kept_apart && own == of_node * partition.units_of_range(),
              what + ": a thread takes what belongs to another node");
        // But not what belongs to a node from which none came.
        claims.begin(partition.ranges(), partition.units(), node_of.data());
        claims.join(0);
        own = 0;
        while (claims.next(0) >= 0) ++own;
        check(own == partition.units(), what + ": work of nodes without threads is left over");
      }
}

void check_files_of_nodes() {
  std::string root = "/tmp/nodes-XXXXXX";
  check(mkdtemp(root.data()) != nullptr, "no temporary folder");
  const auto write = [&root](const std::string& name, const std::string& text) {
    if (name.find('/') != std::string::npos)
      check(std::system(("mkdir -p " + root + "/" + name.substr(0, name.find('/'))).c_str()) == 0,
            "mkdir");
    std::ofstream(root + "/" + name) << text << "\n";
  };
  check(cl::nodes_of_cpus(root + "/none").empty(), "nodes of a machine without them");
  write("online", "0-1,3");
  write("node0/cpulist", "0-2,8");
  write("node1/cpulist", "");  // memory only
  write("node3/cpulist", "4-5");
  const std::vector<uint8_t> nodes = cl::nodes_of_cpus(root);
  check(nodes.size() == 9 && nodes[1] == 0 && nodes[5] == 3 && nodes[8] == 0,
        "nodes are not those of the files");
  check(cl::common_node(nodes, {4, 5}) == 3 && cl::common_node(nodes, {0, 8}) == 0 &&
            cl::common_node(nodes, {0, 4}) == -1 && cl::common_node(nodes, {3}) == -1 &&
            cl::common_node(nodes, {99}) == -1 && cl::common_node(nodes, {}) == -1,
        "threads that are not bound to a node have one");
  write("node3/cpulist", "4-");
  check(cl::nodes_of_cpus(root).empty(), "a list that cannot be read is read");
  check(std::system(("rm -r " + root).c_str()) == 0, "rm");
}

// ---- in threads
// ----------------------------------------------------------------------------------

// In so many threads, several numbers for one where there are more.
template <int64_t kThreads>
void threaded(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  std::vector<std::thread> threads;
  const int64_t step = (count + kThreads - 1) / kThreads;
  for (int64_t begin = 0; begin < count; begin += step)
    threads.emplace_back(body, context, begin, std::min(begin + step, count));
  for (std::thread& thread : threads) thread.join();
}

struct Count {
  cl::Kept<int32_t> kept;
  std::atomic<int64_t>* prepared;
  std::atomic<int64_t>* wrong;
  int64_t panels;
  int32_t* sums;  // [column]
  int64_t throws_at;

  void prepare(int64_t begin, int64_t end) const { prepared->fetch_add(end - begin); }
  void multiply(cl::Worker& worker) const {
    kept.multiply(
        worker, panels,
        [&](const cl::WorkPart& part, int32_t* cells) {
          if (prepared->load() != panels) wrong->fetch_add(1);
          if (part.tile0 == throws_at) throw std::runtime_error("thrown on purpose");
          for (int64_t cell = part.cell0; cell < part.cell1; ++cell) {
            const int32_t value = static_cast<int32_t>(cell % 7 + part.tile0 % 11);
            if (cells != nullptr) {
              cells[cell] = value;
            } else {
              sums[part.tile0 / cl::kStrip] += value;
            }
          }
        },
        [&](const cl::WorkPart& part, const int32_t* cells) {
          for (int64_t cell = 0; cell < kept.partition().cells(); ++cell)
            sums[part.tile0 / cl::kStrip] += cells[cell];
        });
  }
};

template <int64_t kThreads>
void check_region(int64_t n, int64_t k, int64_t threads, const uint8_t* node_of,
                  int64_t throws_at) {
  const cl::WorkShape shape = shape_of(n, k, 1, 2, 4, 128);
  std::atomic<int64_t> prepared{0}, wrong{0};
  std::vector<int32_t> sums(static_cast<size_t>(n / 64));
  const cl::Parallel parallel{&threaded<kThreads>, threads, node_of};
  cl::run_call(parallel, 5,
               Count{cl::Kept<int32_t>(shape, shape.cells, threads), &prepared, &wrong, 5,
                     sums.data(), throws_at});
  bool good = wrong == 0 && prepared == 5;
  for (size_t column = 0; column < sums.size(); ++column) {
    int32_t expected = 0;
    for (int64_t cell = 0; cell < shape.cells; ++cell)
      expected += static_cast<int32_t>(cell % 7 + static_cast<int64_t>(column) * 4 % 11);
    good = good && sums[column] == expected;
  }
  check(good,
        "a region of " + std::to_string(threads) + " threads does not do all of its work once");
}

void check_regions() {
  const uint8_t two_nodes[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  for (int turn = 0; turn < 20; ++turn)
    for (const int64_t n : {64, 192, 4096}) {
      check_region<2>(n, 4096, 2, nullptr, -1);
      check_region<3>(n, 2048, 3, nullptr, -1);
      check_region<4>(n, 4096, 16, nullptr, -1);  // four of the sixteen come
      check_region<1>(n, 4096, 16, two_nodes, -1);
      check_region<16>(n, 4096, 16, two_nodes, -1);
    }
}

// What one thread throws ends the others.
void check_exception() {
  const cl::WorkShape shape = shape_of(4096, 4096, 1, 2, 4, 128);
  std::atomic<int64_t> prepared{0}, wrong{0};
  std::vector<int32_t> sums(64);
  const auto serial = [](int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
    body(context, 0, count);
  };
  bool thrown = false;
  try {
    cl::run_call(
        {serial, 4}, 5,
        Count{cl::Kept<int32_t>(shape, shape.cells, 4), &prepared, &wrong, 5, sums.data(), 0});
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  check(thrown, "an exception is lost");
  check_region<2>(4096, 4096, 2, nullptr, -1);
}

}  // namespace

// Balances all numbers of threads, or with STEP each (7 STEP)-th, which begin at another one in
// each case.
int main(int argc, char** argv) {
  const int64_t step = argc > 1 ? 7 * std::atoi(argv[1]) : 1;
  for (const int64_t threads : {1, 2, 3, 5, 16, 59, 60, 191})
    for (const int64_t rows : {1, 2, 9, 64})
      for (const Layer& layer : {Layer{"narrow", 64, 8192}, Layer{"ragged", 100, 1664},
                                 Layer{"odd", 4096 + 48, 4096}, Layer{"wide", 32000, 768}})
        for (const int64_t cell : {0, 32, 128}) {
          for (const int64_t column : {4, 16})
            check_cover(shape_of(layer.n, layer.k, rows, 6, column, cell), threads,
                        std::string(layer.of) + " in cells of " + std::to_string(cell) + ", " +
                            std::to_string(threads) + " threads");
          cl::WorkShape whole = shape_of(layer.n, layer.k, rows, 6, 4, cell);
          whole.cuts_ragged = false;
          check_cover(whole, threads, std::string(layer.of) + " whole at its end");
        }
  check_balance(step);
  check_unequal_threads();
  check_nodes();
  check_files_of_nodes();
  check_regions();
  check_exception();
  std::printf("schedule: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
