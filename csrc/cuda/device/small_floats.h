// SPDX-License-Identifier: Apache-2.0
// 8-bit floats to fp32, the same source on the device and on the host.
#pragma once

#include <cstdint>

namespace compressed_linear::cuda {

// E4M3 (OCP FP8): its bits as those of fp16 are the value times 2^-8, denormals included. 0x7f and
// 0xff are NaN.
CL_DEVICE float widen_e4m3(uint8_t code) {
  const uint32_t magnitude = code & 0x7fu;
  if (magnitude == 0x7fu) return bits_to_float(0x7fc00000u);
  return widen<Half>(static_cast<uint16_t>((code & 0x80u) << 8 | magnitude << 7)) * 256.0f;
}

// E8M0 (OCP MX): 2^(code - 127); 255 is NaN.
CL_DEVICE float widen_e8m0(uint8_t code) {
  const uint32_t bits = code == 0 ? 0x00400000u : static_cast<uint32_t>(code) << 23;
  return bits_to_float(code == 255 ? 0x7fc00000u : bits);
}

}  // namespace compressed_linear::cuda
