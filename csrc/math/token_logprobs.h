// A row's softmax statistics, mergeable in any grouping (Milakov and Gimelshein, 2018), entropy included.
#pragma once

#include "exp.h"

namespace ppo {

constexpr double kNotRead = -1.0;  // log_sum of a row that is masked or ignored: no softmax has a negative one

// The nearest temperature at which tau, log2(e) / tau and a thousand times that are numbers of the type T that logits
// are computed in: the softmax is as good as its limit there, the largest logits alone or all logits alike. NaN for
// what is not above 0.
template <class T>
PPO_INLINE double usable_temperature(double tau) {
  constexpr double kSmallest = std::numeric_limits<T>::min(), kMost = 1.0 / kSmallest;
  constexpr double kLeast = kSmallest * 0x1p13;  // the gradient multiplies 1 / tau by exponents
  if (!(tau > 0.0)) return std::numeric_limits<double>::quiet_NaN();
  return tau < kLeast ? kLeast : (tau > kMost ? kMost : tau);
}

// x, but no further below 0 than an exponent has to be for 2^x = 0: 0 * -inf would be NaN. NaN stays NaN.
PPO_INLINE float bounded_exponent(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(-200.0f));
  return y;
#else
  return -200.0f > x ? -200.0f : x;
#endif
}

// The same for exp2_nonpositive, whose least value is nothing beside the 1 of a maximum, but not 0.
PPO_INLINE float least_exponent(float x) { return -125.0f > x ? -125.0f : x; }
PPO_INLINE double least_exponent(double x) { return -2000.0 > x ? -2000.0 : x; }

// Of a set of logits z and c = log2(e) / temperature, with x = (z - max) * c:
struct SoftmaxPart {
  double max;       // of z; -inf for an empty set
  double sum;       // of 2^x
  double weighted;  // of 2^x * x
};

PPO_INLINE SoftmaxPart empty_softmax() { return {-std::numeric_limits<double>::infinity(), 0.0, 0.0}; }

// `part` as it would be with another maximum. -inf - -inf must not make NaN of an empty part.
PPO_INLINE SoftmaxPart with_max(const SoftmaxPart& part, double max, double c) {
  if (part.max == max || part.sum == 0.0) return {max, part.sum, part.weighted};
  const double shift = least_exponent((part.max - max) * c), scale = std::exp2(shift);  // 0 * -inf would be NaN
  return {max, part.sum * scale, (part.weighted + shift * part.sum) * scale};
}

PPO_INLINE SoftmaxPart merge(const SoftmaxPart& a, const SoftmaxPart& b, double c) {
  const double max = a.max > b.max ? a.max : b.max;
  const SoftmaxPart x = with_max(a, max, c), y = with_max(b, max, c);
  return {max, x.sum + y.sum, x.weighted + y.weighted};
}

// 2^(z scale - offset) is what float32 sums add up: for a maximum m close to 2^((z - m) c), 1 at m itself.
struct SoftmaxBase {
  float max, scale, offset;

  PPO_INLINE SoftmaxBase(float m, float c) : max(m), scale(c), offset(m * c) {
    if (std::fabs(offset) < 0x1p30f) return;
    // Here neighbouring floats are 64 apart once they are multiplied by c, so that only logits equal to the maximum
    // count, and a power of two in place of c keeps their exponent exactly 0 and all of this finite.
    const uint32_t exponent = bits_as<uint32_t>(m) >> 23 & 0xffu;
    scale = bits_as<float>((exponent < 60 ? 254 : 314 - exponent) << 23);
    offset = m * scale;
  }
};

struct SoftmaxRow {
  double entropy;
  double max;      // over all logits, NaN if the row has no distribution
  double log_sum;  // of 2^x over all logits with that maximum, natural; >= 0

  PPO_INLINE double logp(double z, double c) const {
    const double value = (z - max) * c * kLn2 - log_sum;
    return value > 0.0 ? 0.0 : value;
  }
};

PPO_INLINE SoftmaxRow row_of(double value) { return {value, value, value}; }
PPO_INLINE SoftmaxRow row_not_read() { return {0.0, 0.0, kNotRead}; }

// The row from the statistics of all logits but the target, and the target: for p near 1 the sum over the others is
// the whole information, and log1p keeps it.
PPO_INLINE SoftmaxRow finish_row(const SoftmaxPart& others, double target, double c) {
  const SoftmaxPart one = {target, target == -std::numeric_limits<double>::infinity() ? 0.0 : 1.0, 0.0};
  const bool poisoned =
      !(others.sum < std::numeric_limits<double>::infinity()) || !(target < std::numeric_limits<double>::infinity());
  const SoftmaxPart all = merge(others, one, c);
  if (poisoned || all.sum == 0.0) return row_of(std::numeric_limits<double>::quiet_NaN());
  SoftmaxRow row;
  row.max = all.max;
  const bool target_is_max = target >= others.max;
  const double rest = target_is_max ? with_max(others, target, c).sum : 0.0;
  row.log_sum = target_is_max ? std::log1p(rest) : std::log(all.sum);
  row.entropy = row.log_sum - all.weighted / all.sum * kLn2;
  if (row.entropy < 0.0) row.entropy = 0.0;
  return row;
}

// The gradient of one row with p = softmax(z / tau), whose labels y_k get the gradients g_k, G together:
// (sum_k g_k 1[y_k] - G p) / tau - g_entropy p (log p + H) / tau.
struct SoftmaxGradient {
  double a, b, k;  // of logit_gradient
  double g_entropy, tau, entropy;

  PPO_INLINE SoftmaxGradient(double g_logp, double g_h, double temperature, double h, double log_sum)
      : g_entropy(g_h), tau(temperature), entropy(h) {
    const double scale = std::exp(-log_sum) / tau;
    a = -g_logp * scale;
    b = -g_entropy * scale * kLn2;
    k = (h - log_sum) * kLog2E;
  }

  // The gradient of a label, without the cancellation of 1 - p: `own` of G is its, `others` that of other labels.
  PPO_INLINE double label(double logp, double own, double others) const {
    const double p = std::exp(logp);
    const double entropy_part = p > 0.0 ? -g_entropy * p * (logp + entropy) : 0.0 * p;
    return (-own * std::expm1(logp) + entropy_part - others * p) / tau;
  }
};

// The gradient of every logit but the labels, with c = log2(e) / tau.
template <class T>
PPO_INLINE T logit_gradient(T z, T max, T c, T a, T b, T k) {
  const T x = (z - max) * c;
#ifdef __CUDA_ARCH__
  const T bounded = bounded_exponent(x), power = exp2_fast(bounded);
#else
  const T bounded = least_exponent(x), power = x < bounded ? T(0) : exp2_nonpositive(bounded);
#endif
  return power * (a + b * (bounded + k));
}

// The same where b is 0: to the same bits, for fewer instructions.
template <class T>
PPO_INLINE T logp_gradient(T z, T max, T c, T a) {
  const T x = (z - max) * c;
  return (x < least_exponent(x) ? T(0) : exp2_nonpositive(x)) * a;
}

}  // namespace ppo
