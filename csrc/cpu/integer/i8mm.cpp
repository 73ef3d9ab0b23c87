// SPDX-License-Identifier: Apache-2.0
// NEON with dot products of unsigned by signed bytes (+i8mm, ARMv8.6-A).
#include "neon.h"

namespace compressed_linear::cpu {
namespace {

struct MixedCore : NeonIntegerCore {
  static constexpr bool kTellNarrow = false;
  template <bool Narrow>
  static int8x16_t broadcast(const int32_t* word) {
    return vreinterpretq_s8_s32(set(*word));
  }
  template <bool Narrow>
  static Reg dot(Reg sum, Reg codes, int8x16_t activation) {
    return vusdotq_s32(sum, vreinterpretq_u8_s32(codes), activation);
  }
};

}  // namespace

void integer_i8mm(const Problem& p, const Parallel& parallel) {
  run_integer_linear<VectorEngine<MixedCore>>(p, parallel);
}

}  // namespace compressed_linear::cpu
