"""temporary: replaced below while training runs"""
import torch
from autoprune.data import Images

@torch.no_grad()
def accuracy(model, images, batch_size=500):
    model.eval(); n=0
    for i in range(0,len(images),batch_size):
        part=images[i:i+batch_size]
        n+=(model(part.inputs).argmax(1)==part.labels).sum().item()
    return n/len(images)
