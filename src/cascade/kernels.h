// The operations of the language on chunks of values, with the rules for empty rows:
//   (-inf) - (-inf) = -inf    what a masked row leaves out stays left out: exp of it is 0
//   0 / 0 = 0                 a row whose weights are all 0 has the result 0
// NaN stays NaN everywhere else, in max and min too.
#pragma once
#include "cascade/functions.h"
#include "cascade/lowered.h"

namespace heed::cascade {

double subtract(double a, double b);
double divide(double a, double b);
double maximum(double a, double b);
double minimum(double a, double b);
double gelu(double x);
double sigmoid(double x);
bool compare(Compare how, double a, double b);

/// out[l] = op(a[l], b[l]); a uniform operand has one value. Returns after `lanes` values.
void binary(Op op, const double* a, bool uniform_a, const double* b, bool uniform_b, double* out,
            int lanes);
void unary(Op op, const double* a, double* out, int lanes);

/// d(op)/d(argument `which`) at operands a, b with result y, times `adjoint`; 0 times infinity is
/// 0. What is empty passes nothing on: a maximum of -inf, a minimum of +inf, log 0, 0/0.
double pull_back(Op op, int which, double a, double b, double y, double adjoint);

}  // namespace heed::cascade
