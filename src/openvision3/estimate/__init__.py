"""What a run will cost, before anything runs: nothing is loaded, every number is arithmetic on the config.

`arithmetic` counts one sample's operations and the bytes it keeps for the backward pass, part by part; `devices` is a table of
data sheets; `plan` puts both together (memory, hours, disk, network, advice); `show` is what a person sees.
"""
