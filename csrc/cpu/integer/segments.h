// SPDX-License-Identifier: Apache-2.0
// What of cutting K into segments (rows.h) is asked for outside of the kernels.
#pragma once

#include <string>

#include "layouts/quads.h"

namespace compressed_linear::cpu {

// Why x cannot be quantized in groups of `activation_group` beside the weight groups of `geometry`,
// or an empty text.
std::string why_not_grouped(const Geometry& geometry, int64_t activation_group);

// Segments that K is cut into.
int64_t count_segments(const Geometry& geometry, int64_t activation_group);

// sums[segment][16] = sum of the stored codes of each channel of `tile` over each segment.
void sum_codes(const Geometry& geometry, int64_t activation_group, const uint8_t* packed,
               int64_t tile, int32_t* sums);

}  // namespace compressed_linear::cpu
