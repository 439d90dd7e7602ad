// Stands in for the CUDA runtime header when a .cu file is compiled as C++: see cuda_emulation.h.
#pragma once
#include "cuda_emulation.h"
