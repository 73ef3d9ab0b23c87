// SPDX-License-Identifier: Apache-2.0
#include "paths.h"

#include <array>
#include <atomic>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "byte_codes.h"
#include "rows.h"

namespace compressed_linear::cpu {
namespace {

constexpr size_t kClasses = static_cast<size_t>(PathClass::classes);
constexpr size_t kMostPaths = 4;
constexpr int64_t kAnyM = std::numeric_limits<int64_t>::max();

static_assert(std::size(kPathNames) == kClasses);

struct Path {
  int64_t largest_m;
  const Isa* isa;  // null: the best
};

// In ascending order of M; the first that is large enough counts, and the last one always is.
struct Paths {
  std::array<Path, kMostPaths> list = {{{kAnyM, nullptr}}};
};

using Table = std::array<Paths, kClasses>;

std::atomic<const Table*>& current() {
  static const Table none{};
  static std::atomic<const Table*> table{&none};
  return table;
}

Kernels kernels_of(size_t path_class) {
  return path_class < static_cast<size_t>(PathClass::narrow_token) ? Kernels::floats
                                                                   : Kernels::integers;
}

const Isa& row_of(const Path& path, Kernels kernels) {
  return path.isa != nullptr ? *path.isa : isa(kernels);
}

[[noreturn]] void refuse(const std::string& line, const std::string& why) {
  throw std::invalid_argument("select_paths: '" + line + "' " + why);
}

Paths parse(const std::string& line, std::istringstream& rest, Kernels kernels) {
  Paths paths;
  int64_t before = 0;
  std::string name;
  for (size_t i = 0; rest >> name; ++i) {
    if (i == kMostPaths) refuse(line, "has more than " + std::to_string(kMostPaths) + " paths");
    const Isa& row = find_isa(kernels, name, "select_paths asks for '" + name + "'");
    paths.list[i] = {kAnyM, &row};
    int64_t largest = 0;
    if (!(rest >> largest)) {
      if (!rest.eof()) refuse(line, "has no number behind " + name);
      return paths;
    }
    if (largest <= before) refuse(line, "has numbers that do not ascend from 1");
    paths.list[i].largest_m = before = largest;
  }
  refuse(line, "does not end with the path of every larger M");
}

}  // namespace

bool takes_digits(const Problem& p) {
  const Geometry& g = p.weight.geometry;
  ByteCodes codes;
  return (g.groups == 1 || g.padded_group % kBlock == 0 || 2 * g.padded_group == kBlock) &&
         read_byte_codes(p.weight, codes);
}

PathClass path_class(const Problem& p) {
  const Element element = p.weight.geometry.element;
  const bool integer = element.kind == Kind::integer;
  if (p.weight.layout == PackedLayout::quads) {
    const bool grouped = p.x.activation.group != 0;
    if (element.bits < 8) return grouped ? PathClass::narrow_group : PathClass::narrow_token;
    return grouped ? PathClass::bytes_group : PathClass::bytes_token;
  }
  const PathClass first = element.kind == Kind::float16 || element.kind == Kind::float32 ||
                                  p.weight.wide_table != nullptr
                              ? PathClass::wide_bfloat16
                          : element.kind == Kind::bfloat16      ? PathClass::bf16_bfloat16
                          : takes_digits(p) && element.bits < 8 ? PathClass::int_bfloat16
                          : takes_digits(p)                     ? PathClass::int8_bfloat16
                          : integer && element.bits < 8         ? PathClass::narrow_bfloat16
                                                                : PathClass::bytes_bfloat16;
  const Scalar x = prepared_type(p);
  const int dtype = x == Scalar::bfloat16 ? 0 : x == Scalar::float16 ? 1 : 2;
  return static_cast<PathClass>(static_cast<int>(first) + dtype);
}

const Isa& isa_of(const Problem& p) {
  const Kernels kernels =
      p.weight.layout == PackedLayout::quads ? Kernels::integers : Kernels::floats;
  if (const Isa* forced = forced_isa(kernels)) return *forced;
  const Table& table = *current().load(std::memory_order_acquire);
  const Path* path = table[static_cast<size_t>(path_class(p))].list.data();
  while (p.x.m > path->largest_m) ++path;
  return row_of(*path, kernels);
}

void select_paths(const std::string& lines) {
  Table table{};
  std::istringstream all(lines);
  for (std::string line; std::getline(all, line);) {
    std::istringstream rest(line);
    std::string name;
    if (!(rest >> name)) continue;
    size_t at = 0;
    while (at < kClasses && name != kPathNames[at]) ++at;
    if (at == kClasses) refuse(line, "names no class of calls");
    table[at] = parse(line, rest, kernels_of(at));
  }
  // Never freed: a call may still read the one before, and tables are few.
  current().store(new Table(table), std::memory_order_release);
}

std::string describe_paths() {
  const Table& table = *current().load(std::memory_order_acquire);
  std::ostringstream text;
  for (size_t at = 0; at < kClasses; ++at) {
    const Kernels kernels = kernels_of(at);
    text << kPathNames[at];
    const Isa* forced = forced_isa(kernels);
    const Path* path = table[at].list.data();
    for (; forced == nullptr && path->largest_m != kAnyM; ++path)
      text << ' ' << row_of(*path, kernels).name << ' ' << path->largest_m;
    text << ' ' << (forced != nullptr ? *forced : row_of(*path, kernels)).name << '\n';
  }
  return text.str();
}

}  // namespace compressed_linear::cpu
