#pragma once

#include "attention.h"
