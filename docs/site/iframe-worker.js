// Lets the search work where the site is read from a folder: browsers start no worker there, so its script runs in a hidden
// frame of the page, which passes messages as a worker would.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inside = frame.contentWindow
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.started = new Promise(resolve => {
        const script = frame.contentDocument.createElement("script")
        script.src = new URL(url, location)
        script.onload = resolve
        frame.contentDocument.body.append(script)
      })
    }
    postMessage(data) {
      this.started.then(() => this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data })))
    }
  }
}
