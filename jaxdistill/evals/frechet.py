import numpy as np, scipy.linalg
def frechet_distance(x,y):
    m1,m2=x.mean(0),y.mean(0); c1,c2=np.cov(x.T),np.cov(y.T)
    w,v=np.linalg.eigh(c1); r=(v*np.sqrt(np.maximum(w,0)))@v.T
    return float(((m1-m2)**2).sum()+np.trace(c1+c2)-2*np.sqrt(np.maximum(np.linalg.eigvalsh(r@c2@r),0)).sum())
