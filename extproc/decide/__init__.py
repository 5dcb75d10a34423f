"""The first moment: judge a request once and answer with a refusal or with a decision. Open `pipeline` first."""
