// Included after the templates of an instruction set: the product of blocks with any number of tokens.
#pragma once

namespace {

using Multiply = void (*)(const mspc_matrix &, const Inputs &, int64_t token, int64_t block, const Outputs &);

template <class Lines, int64_t kPlanes>
Multiply codes_for(int64_t tokens) {
  constexpr Multiply table[] = {multiply_codes<Lines, 1, kPlanes>, multiply_codes<Lines, 2, kPlanes>,
                                multiply_codes<Lines, 3, kPlanes>, multiply_codes<Lines, 4, kPlanes>};
  return table[tokens - 1];
}

template <class Lines>
Multiply codes_in(int64_t planes, int64_t tokens) {
  if constexpr (kPlanesApart)
    if (planes == 1) return codes_for<Lines, 1>(tokens);
  return codes_for<Lines, 2>(tokens);
}

template <int64_t kBits>
Multiply codes_of_bits(const mspc_matrix &m, int64_t planes, int64_t tokens) {
  if (m.structure == kDense) return codes_in<DenseLines<kBits>>(planes, tokens);
  if (m.structure == kTwoFour) return codes_in<TwoFourLines<kBits>>(planes, tokens);
  if constexpr (kBits != 3) return codes_in<Expanded<kBits>>(planes, tokens);
  return nullptr;  // no bitmap holds codes of three bits (`is_known`)
}

template <int64_t kStructure, int64_t kContent>
Multiply values_for(int64_t tokens) {
  constexpr Multiply table[] = {multiply_values<kStructure, kContent, 1>, multiply_values<kStructure, kContent, 2>,
                                multiply_values<kStructure, kContent, 3>, multiply_values<kStructure, kContent, 4>};
  return table[tokens - 1];
}

template <int64_t kContent>
Multiply values_of(const mspc_matrix &m, int64_t tokens) {
  if (m.structure == kDense) return values_for<kDense, kContent>(tokens);
  if (m.structure == kTwoFour) return values_for<kTwoFour, kContent>(tokens);
  return values_for<kBitmap, kContent>(tokens);
}

Multiply choose(const mspc_matrix &m, int64_t planes, int64_t tokens) {
  switch (m.content) {
    case 8: return codes_of_bits<8>(m, planes, tokens);
    case 4: return codes_of_bits<4>(m, planes, tokens);
    case 3: return codes_of_bits<3>(m, planes, tokens);
    case 2: return codes_of_bits<2>(m, planes, tokens);
    case kBfloat16: return values_of<kBfloat16>(m, tokens);
    case kFloat16: return values_of<kFloat16>(m, tokens);
    default: return values_of<kFloat32>(m, tokens);
  }
}

// More tokens than a block takes at once read its weights again, from the cache of the core.
void product(const mspc_matrix &m, const Inputs &in, int64_t first_block, int64_t last_block, const Outputs &out) {
  Multiply whole = choose(m, in.planes, kMostTokens);
  int64_t left = in.tokens % kMostTokens;
  Multiply rest = left ? choose(m, in.planes, left) : nullptr;
  for (int64_t block = first_block; block < last_block; block++) {
    for (int64_t token = 0; token + kMostTokens <= in.tokens; token += kMostTokens) whole(m, in, token, block, out);
    if (rest) rest(m, in, in.tokens - left, block, out);
  }
}

}  // namespace
