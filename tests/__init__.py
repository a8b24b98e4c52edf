"""The tests compile DeepSpeed's extensions with the same ninja as the launch scripts that they start: two
versions of it don't accept what the other has built, and would compile in turns, a minute each."""

from seft_ds.distributed.collectives import own_tools_first

own_tools_first()
