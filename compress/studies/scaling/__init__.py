"""Studies of how test loss scales with parameters, data and compute: experiments, sweeps of them, and fits."""
