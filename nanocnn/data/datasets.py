class Raw: pass
def dataset(*a): return lambda f:f
