// Everything a user of the core library includes.
#pragma once
#include "heed/depthwise_conv.h"
#include "heed/error.h"
#include "heed/feature_map.h"
#include "heed/flash_attention.h"
#include "heed/local_linear_attention.h"
#include "heed/masks.h"
#include "heed/moh_router.h"
#include "heed/relu_linear_attention.h"
#include "heed/run.h"
#include "heed/sigmoid_attention.h"
#include "heed/tensor.h"
#include "heed/version.h"
