// SPDX-License-Identifier: Apache-2.0
// Rows of a packed weight by their numbers: the lookup of an embedding table that is stored in the
// layout of layouts/planes.h, so that a tied output head and the table need one copy. Plain C++,
// every processor: a row is spread over the whole of its tile, so a lookup waits for memory and not
// for arithmetic.
#pragma once

#include "cpu/common/problem.h"

namespace compressed_linear::cpu {

// out[i, c] = sum of w[ids[i], k] over the k with perm[k] == c, or w[ids[i], c] without perm, where
// w[n,k] = row_scale[n] scale[n,g] (value - zero[n,g]) in fp32, rounded once to out_type.
struct Lookup {
  Weight weight;        // of layouts/planes.h; `middle` is all that codes count from
  const int32_t* perm;  // [k] or null; channels that out does not have are left out
  const int64_t* ids;   // each from 0 to n - 1
  int64_t channels;     // of out: k without perm
  void* out;            // [*, channels] contiguous
  Scalar out_type;
};

// Writes rows [begin, end) of out.
void look_up(const Lookup& lookup, int64_t begin, int64_t end);

}  // namespace compressed_linear::cpu
