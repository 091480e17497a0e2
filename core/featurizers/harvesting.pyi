from featurizers_harvest import harvest as harvest
