// SPDX-License-Identifier: Apache-2.0
// AVX-VNNI's engine of digits with its byte dot product in the encoding of AVX-512, which more
// processors can run; built without -mavxvnni.
#include "cpu/float/avxvnni.cpp"
