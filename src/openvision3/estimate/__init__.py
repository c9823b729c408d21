"""What a run will cost, before anything runs: nothing is loaded, every number is arithmetic on the config.

`arithmetic` counts one sample's operations and the bytes it keeps for the backward pass; `devices` is a table of data sheets;
`sizes` reads a config and counts each part; `plan` makes memory, hours, disk, network and advice of it; `explain` says all formulas
with their numbers; `show` is what a person sees.
"""
