// SPDX-License-Identifier: Apache-2.0
#include "cpu/common/paths.h"

#include "arguments.h"
#include "cpu/rates/rates.h"
#include "layouts/quads.h"
#include "ops.h"
#include "packed.h"
#include "problem.h"

namespace compressed_linear {
namespace {

cpu::Kernels parse_kernels(const char* op, const std::string& name) {
  if (name == "floats") return cpu::Kernels::floats;
  if (name == "integers") return cpu::Kernels::integers;
  fail(op, "kernels is '", name, "', expected floats or integers");
}

}  // namespace

std::string isa(std::string kernels) { return cpu::isa(parse_kernels("isa", kernels)).name; }

std::string supported_isas(std::string kernels) {
  std::string text;
  for (const cpu::Isa* row : cpu::supported_isas(parse_kernels("supported_isas", kernels)))
    text += (text.empty() ? "" : " ") + std::string(row->name);
  return text;
}

void select_isa(std::string kernels, std::string name) {
  cpu::select_isa(parse_kernels("select_isa", kernels), name);
}

void select_paths(std::string paths) { cpu::select_paths(paths); }

std::string paths() { return cpu::describe_paths(); }

std::string measure_rates() {
  const cpu::MeasuredRates found = cpu::measure_rates();
  std::ostringstream text;
  text << "clock " << found.clock << '\n';
  for (const cpu::MeasuredRate& rate : found.rates)
    text << rate.name << ' ' << rate.per_cycle << '\n';
  return text.str();
}

std::string layout_id(std::string layout) {
  // Layers keep their problem, too.
  const std::string version = "-problem" + std::to_string(kProblemVersion);
  switch (parse_layout("layout_id", layout)) {
    case PackedLayout::planes:
      return cpu::kLayoutId + version;
    case PackedLayout::quads:
      return cpu::kQuadsLayoutId + version;
    default:
      fail("layout_id", "layout is 'marlin', expected planes or quads");
  }
}

}  // namespace compressed_linear
