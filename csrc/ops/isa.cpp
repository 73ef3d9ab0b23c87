// SPDX-License-Identifier: Apache-2.0
#include "cpu/common/isa.h"

#include "arguments.h"
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
