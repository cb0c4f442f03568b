"""What this project has not written: S3 servers, engines that convert, schedulers, all Pythons and packages."""
