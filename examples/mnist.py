"""PyTorch's MNIST example on Fashion-MNIST: the lines marked "anymask" are all that a sparse training adds."""

import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from torch.optim.lr_scheduler import StepLR

import anymask.data


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.norm = nn.BatchNorm2d(64)
        self.act = nn.ReLU()
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = self.act(self.conv1(x))
        x = self.act(self.norm(self.conv2(x)))
        x = torch.flatten(F.max_pool2d(x, 2), 1)
        return self.fc2(self.act(self.fc1(x)))


def train(args, model, device, train_loader, optimizer, epoch):
    model.train()
    for batch_idx, (data, target) in enumerate(train_loader):
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        output = model(data)
        loss = F.cross_entropy(output, target)
        loss = args.recipe.loss(output, target)  # anymask 3/4
        loss.backward()
        optimizer.step()
        args.recipe.step()  # anymask 4/4
        if batch_idx % args.log_interval == 0:
            print(f"Train Epoch: {epoch} [{batch_idx}/{len(train_loader)}]\tLoss: {loss.item():.6f}")
        if args.dry_run:
            break


def test(model, device, test_loader):
    model.eval()
    loss, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for data, target in test_loader:
            data, target = data.to(device), target.to(device)
            output = model(data)
            loss += F.cross_entropy(output, target, reduction="sum").item()
            correct += (output.argmax(dim=1) == target).sum().item()
            count += len(target)
    print(f"\nTest set: Average loss: {loss / count:.4f}, Accuracy: {correct}/{count} ({100.0 * correct / count:.0f}%)\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description="PyTorch MNIST Example")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--gamma", type=float, default=0.7)
    parser.add_argument("--dry-run", action="store_true", help="one batch an epoch")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-interval", type=int, default=10)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = anymask.data.load("fashion-mnist-5k")
    loader = anymask.data.Batches(images.train, batch_size=args.batch_size, shuffle=True)
    test_loader = anymask.data.Batches(images.test, batch_size=1000, shuffle=False)

    model = Net().to(device)
    optimizer = optim.Adadelta(model.parameters(), lr=args.lr)
    scheduler = StepLR(optimizer, step_size=1, gamma=args.gamma)
    n = args.epochs * (1 if args.dry_run else len(loader))
    anymask.hold(anymask.prune(model, "magnitude", sparsity=0.9), model, optimizer)  # anymask 1/4
    args.recipe = anymask.Recipe.preset("tost").attach(model, optimizer, total_steps=n, example=next(iter(loader))[0])  # anymask 2/4
    for epoch in range(1, args.epochs + 1):
        train(args, model, device, loader, optimizer, epoch)
        test(model, device, test_loader)
        scheduler.step()
    return model


if __name__ == "__main__":
    main()
