import sys, time; sys.path.insert(0,'/work/main/tests')
from test_certify import GOOD, ONE
from dataclasses import replace
def test_it():
    for k in (GOOD, replace(GOOD,tasks=40), ONE, replace(ONE,tasks=150)):
        t=time.process_time(); w=time.perf_counter(); r=k.certify(); print(k.name,k.tasks,'cpu',time.process_time()-t,'wall',time.perf_counter()-w)
