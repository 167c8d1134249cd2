// The labels of one row of logits, of which there may be several, and some may not count.
#pragma once

#include <cstdint>
#include <limits>

#include "exp.h"

namespace ppo {

struct RowLabels {
  const int64_t* data;
  int64_t count, vocab, ignore_index;

  PPO_INLINE bool counts(int64_t k) const { return data[k] != ignore_index; }
  PPO_INLINE bool inside(int64_t k) const { return data[k] >= 0 && data[k] < vocab; }
};

// What a row is read for: the likeliest label that counts, which is left out of the sums. Of equals it is the one with
// the lower number, so that the order of the labels changes no bit.
struct Anchor {
  int64_t label = -1;  // none
  double logit = -std::numeric_limits<double>::infinity();
  bool counts = false;   // some label does
  bool outside = false;  // one that counts is no token

  PPO_INLINE void merge(const Anchor& other) {
    counts = counts || other.counts;
    outside = outside || other.outside;
    const bool better = other.logit > logit || (other.logit == logit && other.label < label);
    if (other.label >= 0 && (label < 0 || better)) label = other.label, logit = other.logit;
  }

  // Label k of a row, whose logits are only looked at if there is something to choose.
  template <class Logit>
  PPO_INLINE void merge(const RowLabels& labels, int64_t k, const Logit& logit_of) {
    if (!labels.counts(k)) return;
    counts = true;
    if (!labels.inside(k)) {
      outside = true;
      return;
    }
    double z = labels.count > 1 ? logit_of(labels.data[k]) : 0.0;
    if (z != z) z = std::numeric_limits<double>::infinity();  // makes the row NaN from wherever it is
    merge(Anchor{labels.data[k], z, true, false});
  }
};

// The incoming gradients of a row's labels.
struct LabelGradients {
  double sum = 0.0;  // NaN with a label that is no token
  bool any = false;  // one is not 0

  PPO_INLINE void add(const RowLabels& labels, int64_t k, double gradient) {
    if (!labels.counts(k)) return;
    any = any || gradient != 0.0;
    sum += labels.inside(k) ? gradient : std::numeric_limits<double>::quiet_NaN();
  }
};

}  // namespace ppo
