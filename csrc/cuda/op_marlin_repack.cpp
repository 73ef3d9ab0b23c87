// SPDX-License-Identifier: Apache-2.0
// The ops that pack Marlin's layout, for weights on a GPU. They synchronize with the GPU once,
// to read whether codes are wrong; preparation may.
// Has run on hardware: nothing.
#include "cuda/marlin/repack_launch.h"
#include "op_cuda.h"
#include "ops.h"
#include "ops/packed.h"
#include "ops/repack.h"

namespace compressed_linear::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

Geometry geometry_on_gpu(const char* op, const std::string& layout, int64_t n, int64_t k,
                         int64_t group_size, const std::string& element) {
  if (parse_layout(op, layout) != PackedLayout::marlin)
    fail(op, "layout is '", layout, "', expected marlin on a CUDA device");
  return geometry_in(op, PackedLayout::marlin, n, k, group_size, element);
}

Tensor no_wrong(const Tensor& like) {
  const std::array<int64_t, 1> shape = {1};
  return torch::stable::new_zeros(like, {shape.data(), 1}, ScalarType::Int);
}

bool any_wrong(const Tensor& wrong) {
  const Tensor count =
      torch::stable::to(wrong, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  return *static_cast<const int32_t*>(count.const_data_ptr()) != 0;
}

// Completes `p`, whose source is set, and runs the kernel for output channels [row_begin, row_end).
void run(const char* op, const char* what, RepackParams& p, const Geometry& g, int64_t row_begin,
         Tensor& packed) {
  check_plain_cuda(op, "packed", packed);
  check_marlin(op, packed, g);
  const int64_t row_end = row_begin + p.source.rows + p.source.blank;
  check_row_range(op, row_begin, row_end, g.n);
  if (row_end == row_begin) return;
  const Tensor wrong = no_wrong(packed);
  const cpu::WrongCodes codes = cpu::wrong_codes(g.element);
  p.packed = static_cast<uint32_t*>(packed.mutable_data_ptr());
  p.wrong = static_cast<int*>(wrong.mutable_data_ptr());
  p.n = static_cast<int>(g.n);
  p.k = static_cast<int>(g.k);
  p.row_begin = static_cast<int>(row_begin);
  p.wrong_mask = codes.mask;
  p.wrong_add = codes.add;
  p.wrong_bits = codes.bits;
  check_launch(op, launch_repack_codes(g.element.bits, p, current_stream(packed)));
  if (!any_wrong(wrong)) return;
  if (g.element.kind == Kind::integer)
    fail(op, what, " holds codes of more than ", g.element.bits, " bits");
  fail(op, what, " holds codes of infinity or NaN, expected finite numbers");
}

RepackSource plain_source(const cpu::CodeSource& s, const Tensor& k_at, const Tensor* n_at) {
  return {s.data,
          s.bytes,
          s.row_bytes,
          static_cast<CodeOrder>(s.order),
          s.container_bits,
          s.widths[0],
          s.flip,
          static_cast<int>(s.rows),
          static_cast<int>(s.blank),
          s.blank_code,
          static_cast<int>(s.n_first),
          static_cast<const int32_t*>(k_at.const_data_ptr()),
          n_at == nullptr ? nullptr : static_cast<const int32_t*>(n_at->const_data_ptr())};
}

ScaleParams scale_params(const cpu::MarlinValues& from, Tensor& out) {
  return {from.data,
          from.n_stride,
          from.group_stride,
          static_cast<int>(from.n),
          static_cast<int>(from.groups),
          out.mutable_data_ptr(),
          MarlinColumns::grouped,
          nullptr};
}

}  // namespace

void pack_rows(std::string layout, Tensor packed, Tensor rows, int64_t row_start, int64_t n,
               int64_t group_size, std::string element) {
  constexpr const char* op = "pack_rows";
  check_plain_cuda(op, "rows", rows, &packed);
  check_type(op, "rows", rows, ScalarType::Byte);
  if (rows.dim() != 2) fail(op, "rows has shape ", shape_text(rows), ", expected [rows, k]");
  const Geometry g = geometry_on_gpu(op, layout, n, rows.size(1), group_size, element);
  const DeviceGuard guard(packed.get_device_index());
  const cpu::Repack job = cpu::from_rows(g, cpu::PackedLayout::marlin, rows.const_data_ptr(),
                                         rows.size(0), row_start, nullptr);
  const std::array<int64_t, 1> shape = {g.k};
  const Tensor on_cpu = torch::stable::empty({shape.data(), 1}, ScalarType::Int);
  int32_t* at = static_cast<int32_t*>(on_cpu.mutable_data_ptr());
  for (int64_t k = 0; k < g.k; ++k) at[k] = static_cast<int32_t>(8 * k);
  const Tensor k_at = torch::stable::to(on_cpu, packed.device());
  RepackParams p{};
  p.source = plain_source(job.source, k_at, nullptr);
  run(op, "rows", p, g, row_start, packed);
}

void repack_codes(std::string layout, Tensor packed, Tensor stored, std::string order, Tensor k_at,
                  std::optional<Tensor> n_at, std::vector<int64_t> widths, int64_t flip,
                  int64_t n_first, int64_t rows, int64_t blank, int64_t blank_code,
                  int64_t row_start, int64_t n, int64_t group_size, std::string element) {
  constexpr const char* op = "repack_codes";
  if (k_at.dim() < 1) fail(op, "k_at has shape [], expected [k] or [one per width, k]");
  const Geometry g = geometry_on_gpu(op, layout, n, k_at.size(k_at.dim() - 1), group_size, element);
  check_plain_cuda(op, "stored", stored, &packed);
  if (widths.size() != 1)
    fail(op, "widths holds ", widths.size(), " numbers, expected one on a CUDA device");
  cpu::CodeSource source{};
  read_code_source(op, source, stored, order, k_at, n_at, widths, flip, n_first, rows, blank,
                   blank_code, g.element, element);
  const DeviceGuard guard(packed.get_device_index());
  const Tensor k_there = torch::stable::to(k_at, packed.device());
  std::optional<Tensor> n_there;
  if (n_at.has_value()) n_there = torch::stable::to(*n_at, packed.device());
  RepackParams p{};
  p.source = plain_source(source, k_there, n_there.has_value() ? &*n_there : nullptr);
  run(op, "stored", p, g, row_start, packed);
}

Tensor marlin_scales(Tensor scale, std::string columns) {
  constexpr const char* op = "marlin_scales";
  const MarlinColumns order = parse_columns(op, columns);
  check_cuda(op, "scale", scale);
  const cpu::MarlinValues from = values_of(op, "scale", scale);
  check_scale(op, scale, order);
  const DeviceGuard guard(scale.get_device_index());
  const std::array<int64_t, 2> shape = {from.groups, from.n};
  Tensor out = torch::stable::new_empty(scale, {shape.data(), 2});
  ScaleParams p = scale_params(from, out);
  p.columns = order;
  check_launch(
      op, launch_repack_scales(static_cast<int>(from.element_bytes), p, current_stream(scale)));
  return out;
}

Tensor marlin_zeros(Tensor zero, int64_t bits) {
  constexpr const char* op = "marlin_zeros";
  check_cuda(op, "zero", zero);
  const cpu::MarlinValues from = values_of(op, "zero", zero);
  check_zero(op, zero, bits);
  const DeviceGuard guard(zero.get_device_index());
  const std::array<int64_t, 2> shape = {from.groups, from.n * bits / marlin::kWordBits};
  Tensor out = torch::stable::new_empty(zero, {shape.data(), 2}, ScalarType::Int);
  const Tensor wrong = no_wrong(zero);
  ScaleParams p = scale_params(from, out);
  p.wrong = static_cast<int*>(wrong.mutable_data_ptr());
  check_launch(op, launch_repack_zeros(static_cast<int>(bits), p, current_stream(zero)));
  if (any_wrong(wrong)) fail(op, "zero holds zero points of more than ", bits, " bits");
  return out;
}

}  // namespace compressed_linear::cuda
