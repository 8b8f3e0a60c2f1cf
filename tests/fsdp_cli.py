"""`manticore-hf` as its users start it, but sharding on CPUs, too: see cpu_fsdp."""

import sys

import cpu_fsdp

from manticore_hf.cli import main

cpu_fsdp.allow()
sys.exit(main())
